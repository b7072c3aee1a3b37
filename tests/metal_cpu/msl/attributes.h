// The attributes that MLX may add to a kernel's signature, as the engine hands them to the entry.
#pragma once

struct Attributes {
  unsigned thread_position_in_grid[3], thread_position_in_threadgroup[3];
  unsigned threadgroup_position_in_grid[3], threadgroups_per_grid[3], threads_per_grid[3];
  unsigned threads_per_threadgroup[3], dispatch_threads_per_threadgroup[3];
  unsigned grid_origin[3], grid_size[3];
  unsigned thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  unsigned simdgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup;
  unsigned threads_per_simdgroup, thread_execution_width;
  unsigned thread_index_in_quadgroup, quadgroup_index_in_threadgroup;
  unsigned quadgroups_per_threadgroup, dispatch_quadgroups_per_threadgroup;
};
