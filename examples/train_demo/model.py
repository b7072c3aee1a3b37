"""A Qwen3.5 dense model in plain torch, for training only, with the family's names and equations.

It covers what the demonstration needs: pictures of one fixed size, right-padded batches, no cache.
`export.py` writes its weights as a Hugging Face folder, and `evaluate.py` checks them in
transformers' own implementation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """x / rms(x) * (1 + w), w stored around 0."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), eps=1e-6) * (1 + self.weight)


def linear(rows: int, columns: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(columns, rows, bias=bias)


class CausalConv(torch.autograd.Function):
    """Depthwise causal convolution with four taps on `[B, T, C]`; tap 3 is the current token's.

    Written out because autograd through four slices fills four arrays of zeros on the way back.
    """

    @staticmethod
    def forward(ctx, u: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(u, taps)
        out = u * taps[:, 3]
        for back in (1, 2, 3):
            out[:, back:].addcmul_(u[:, :-back], taps[:, 3 - back])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        u, taps = ctx.saved_tensors
        du = grad * taps[:, 3]
        dw = [(grad * u).sum((0, 1))]
        for back in (1, 2, 3):
            du[:, :-back].addcmul_(grad[:, back:], taps[:, 3 - back])
            dw.insert(0, (grad[:, back:] * u[:, :-back]).sum((0, 1)))
        return du, torch.stack(dw, -1)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunk: int) -> Tensor:
    """The gated delta rule in chunks.

    q and k `[B, Hk, T, D]`, v `[B, Hv, T, D]`, g and beta `[B, Hv, T]`, T a multiple of `chunk`;
    value head j reads key head j // (Hv / Hk).
    """
    b, hk, t, d = q.shape
    hv, e = v.shape[1], v.shape[-1]
    grouped = (b, hk, hv // hk, t // chunk, chunk)
    q, k = (x.reshape(b, hk, 1, t // chunk, chunk, d) for x in (q, k))
    v, g, beta = v.reshape(*grouped, e), g.reshape(grouped).cumsum(-1), beta.reshape(*grouped, 1)
    above = torch.ones(chunk, chunk, dtype=torch.bool).triu(1)
    decay = (g.unsqueeze(-1) - g.unsqueeze(-2)).masked_fill(above, -torch.inf).exp()
    grown = g.exp().unsqueeze(-1)
    right = torch.cat([beta * v, k * (beta * grown)], -1)
    # the solver takes the unit diagonal as given and reads the lower triangle only
    solve = torch.linalg.solve_triangular
    right = solve(k @ k.mT * (beta * decay), right, upper=False, unitriangular=True)
    last = g[..., -1:]
    u, w = right.split([e, d], -1)
    parts = (u, w, q @ k.mT * decay, q * grown, k * (last - g).exp().unsqueeze(-1))
    parts = (*parts, last.exp().unsqueeze(-1))
    state = q.new_zeros(b * hv, d, e)
    out = []
    for u, w, inner, read, write, keep in zip(
        *(x.flatten(0, 2).unbind(1) for x in parts), strict=True
    ):
        fresh = torch.baddbmm(u, w, state, alpha=-1)
        out.append(torch.baddbmm(read @ state, inner, fresh))
        state = torch.baddbmm(state * keep, write.mT, fresh)
    return torch.stack(out, 1).view(b, hv, t, e)


class DeltaNet(nn.Module):
    """Gated DeltaNet; T is padded to whole chunks inside."""

    chunk = 32

    def __init__(self, c: dict) -> None:
        super().__init__()
        hidden, self.hk, self.hv = (
            c["hidden_size"],
            c["linear_num_key_heads"],
            c["linear_num_value_heads"],
        )
        self.d = c["linear_key_head_dim"]
        self.keys, self.values = self.hk * self.d, self.hv * self.d
        self.in_proj_qkv = linear(2 * self.keys + self.values, hidden)
        self.in_proj_z = linear(self.values, hidden)
        self.in_proj_b = linear(self.hv, hidden)
        self.in_proj_a = linear(self.hv, hidden)
        self.conv1d = nn.Module()
        self.conv1d.weight = nn.Parameter(torch.empty(2 * self.keys + self.values, 1, 4))
        # slow to fast decays, so that some heads remember the whole prompt from the start
        self.A_log = nn.Parameter(torch.empty(self.hv).uniform_(1, 8).log())
        step = torch.logspace(-3, -1, self.hv)
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.ones(self.d))
        self.out_proj = linear(hidden, self.values)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        c = F.silu(CausalConv.apply(self.in_proj_qkv(x), self.conv1d.weight[:, 0]))
        q, k, v = c.split([self.keys, self.keys, self.values], -1)
        q, k, v = (y.reshape(b, t, -1, self.d).transpose(1, 2) for y in (q, k, v))
        # x / sqrt(sum(x^2) + 1e-6) written as an rms norm; q is scaled by D^-0.5 besides
        scale = torch.full((self.d,), self.d**-0.5)
        k = F.rms_norm(k, (self.d,), scale, 1e-6 / self.d)
        q = F.rms_norm(q, (self.d,), scale * self.d**-0.5, 1e-6 / self.d)
        beta = self.in_proj_b(x).sigmoid().mT
        g = (-self.A_log.exp() * F.softplus(self.in_proj_a(x) + self.dt_bias)).mT
        more = -t % self.chunk
        q, k, v = (F.pad(y, (0, 0, 0, more)) for y in (q, k, v))
        out = delta_rule(q, k, v, F.pad(g, (0, more)), F.pad(beta, (0, more)), self.chunk)
        out = out[:, :, :t].transpose(1, 2)
        z = self.in_proj_z(x).reshape(b, t, self.hv, self.d)
        out = F.rms_norm(out, (self.d,), self.norm.weight, 1e-6) * F.silu(z)
        return self.out_proj(out.reshape(b, t, -1))


class Attention(nn.Module):
    """Gated full attention with partial interleaved M-RoPE."""

    def __init__(self, c: dict) -> None:
        super().__init__()
        hidden, self.d = c["hidden_size"], c["head_dim"]
        self.n, self.m = c["num_attention_heads"], c["num_key_value_heads"]
        self.q_proj = linear(2 * self.n * self.d, hidden)
        self.k_proj = linear(self.m * self.d, hidden)
        self.v_proj = linear(self.m * self.d, hidden)
        self.o_proj = linear(hidden, self.n * self.d)
        self.q_norm, self.k_norm = Norm(self.d), Norm(self.d)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        b, t, _ = x.shape
        q, gate = self.q_proj(x).view(b, t, self.n, 2 * self.d).chunk(2, -1)
        k, v = (p(x).view(b, t, self.m, self.d) for p in (self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        k, v = (y.repeat_interleave(self.n // self.m, 1) for y in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out = out.transpose(1, 2).reshape(b, t, -1) * gate.reshape(b, t, -1).sigmoid()
        return self.o_proj(out)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    dim = cos.shape[-1]
    y, rest = x[..., :dim], x[..., dim:]
    a, b = y.chunk(2, -1)
    return torch.cat([y * cos + torch.cat([-b, a], -1) * sin, rest], -1)


def text_rope(positions: Tensor) -> tuple[Tensor, Tensor]:
    """`positions` `[3, B, T]` -> cos, sin `[B, T, 1, 64]`; frequency i takes axis i mod 3."""
    i = torch.arange(32)
    angles = positions[i % 3].permute(1, 2, 0) * 1e7 ** (-i / 32)
    angles = torch.cat([angles, angles], -1).unsqueeze(2)
    return angles.cos(), angles.sin()


class Mlp(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        hidden, inner = c["hidden_size"], c["intermediate_size"]
        self.gate_proj, self.up_proj = linear(inner, hidden), linear(inner, hidden)
        self.down_proj = linear(hidden, inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: dict, kind: str) -> None:
        super().__init__()
        self.full = kind == "full_attention"
        if self.full:
            self.self_attn = Attention(c)
        else:
            self.linear_attn = DeltaNet(c)
        self.mlp = Mlp(c)
        self.input_layernorm = Norm(c["hidden_size"])
        self.post_attention_layernorm = Norm(c["hidden_size"])

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        y = self.input_layernorm(x)
        x = x + (self.self_attn(y, rope) if self.full else self.linear_attn(y))
        return x + self.mlp(self.post_attention_layernorm(x))


class Block(nn.Module):
    """One block of the vision tower on `[slices, 36, h]`."""

    def __init__(self, c: dict) -> None:
        super().__init__()
        h, self.heads = c["hidden_size"], c["num_heads"]
        self.norm1, self.norm2 = nn.LayerNorm(h, eps=1e-6), nn.LayerNorm(h, eps=1e-6)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = linear(3 * h, h, True), linear(h, h, True)
        self.mlp.linear_fc1 = linear(c["intermediate_size"], h, True)
        self.mlp.linear_fc2 = linear(h, c["intermediate_size"], True)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        s, n, _ = x.shape
        q, k, v = self.attn.qkv(self.norm1(x)).view(s, n, 3, self.heads, -1).unbind(2)
        q, k = rotate(q, rope), rotate(k, rope)
        out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)))
        x = x + self.attn.proj(out.transpose(1, 2).reshape(s, n, -1))
        inner = F.gelu(self.mlp.linear_fc1(self.norm2(x)), approximate="tanh")
        return x + self.mlp.linear_fc2(inner)


class Vision(nn.Module):
    """The tower for slices of `side` by `side` patches in merge order."""

    def __init__(self, c: dict, side: int = 6) -> None:
        super().__init__()
        h = c["hidden_size"]
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv3d(3, h, (2, 16, 16), (2, 16, 16))
        self.pos_embed = nn.Embedding(c["num_position_embeddings"], h)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c["depth"]))
        self.merger = nn.Module()
        self.merger.norm = nn.LayerNorm(h, eps=1e-6)
        self.merger.linear_fc1 = linear(4 * h, 4 * h, True)
        self.merger.linear_fc2 = linear(c["out_hidden_size"], 4 * h, True)
        grid = torch.arange(side * side).view(side // 2, 2, side // 2, 2)
        order = grid.transpose(1, 2).flatten()
        rows, columns = order // side, order % side
        table = int(c["num_position_embeddings"] ** 0.5)
        self.corners = corners(rows, columns, side, table)
        quarter = h // c["num_heads"] // 4
        freq = 1e4 ** (-torch.arange(quarter) / quarter)
        angles = torch.cat([rows[:, None] * freq, columns[:, None] * freq], -1)
        angles = torch.cat([angles, angles], -1).unsqueeze(1)
        self.rope = angles.cos(), angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        proj = self.patch_embed.proj
        x = F.linear(x, proj.weight.flatten(1), proj.bias)
        index, weight = self.corners
        x = x + (self.pos_embed(index) * weight.unsqueeze(-1)).sum(0)
        for block in self.blocks:
            x = block(x, self.rope)
        x = self.merger.norm(x).reshape(-1, 4 * x.shape[-1])
        return self.merger.linear_fc2(F.gelu(self.merger.linear_fc1(x)))


def corners(rows: Tensor, columns: Tensor, side: int, table: int) -> tuple[Tensor, Tensor]:
    """Bilinear resampling of the position table: indices and weights `[4, 36]` for each patch."""
    y, x = (v * (table - 1) / (side - 1) for v in (rows, columns))
    y0, x0 = y.floor().long(), x.floor().long()
    y1, x1 = (y0 + 1).clamp(max=table - 1), (x0 + 1).clamp(max=table - 1)
    fy, fx = y - y0, x - x0
    index = torch.stack([y0 * table + x0, y0 * table + x1, y1 * table + x0, y1 * table + x1])
    weight = torch.stack([(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx])
    return index, weight


class Mtp(nn.Module):
    """The draft head: final hidden of token i and embedding of token i + 1 give token i + 2."""

    def __init__(self, c: dict) -> None:
        super().__init__()
        hidden = c["hidden_size"]
        self.fc = linear(hidden, 2 * hidden)
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = Norm(hidden), Norm(hidden)
        self.layers = nn.ModuleList([Layer(c, "full_attention")])
        self.norm = Norm(hidden)

    def forward(self, embedded: Tensor, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        both = [self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)]
        return self.norm(self.layers[0](self.fc(torch.cat(both, -1)), rope))


class Demo(nn.Module):
    """Text model, vision tower and draft head; the keys of `state_dict` are the published names."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        text = config["text_config"]
        self.config = config
        language = nn.Module()
        language.embed_tokens = nn.Embedding(text["vocab_size"], text["hidden_size"])
        language.layers = nn.ModuleList(Layer(text, kind) for kind in text["layer_types"])
        language.norm = Norm(text["hidden_size"])
        self.model = nn.Module()
        self.model.language_model = language
        self.model.visual = Vision(config["vision_config"])
        self.mtp = Mtp(text)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.05 if "embed" in name else p[0].numel() ** -0.5)
            elif name.endswith(".bias"):
                nn.init.zeros_(p)

    def hidden(self, ids: Tensor, positions: Tensor, patches: Tensor) -> Tensor:
        """The final hidden states `[B, T, H]` after the last norm."""
        language = self.model.language_model
        x = language.embed_tokens(ids)
        if len(patches):
            pads = self.config["image_token_id"], self.config["video_token_id"]
            mask = (ids == pads[0]) | (ids == pads[1])
            x = x.masked_scatter(mask.unsqueeze(-1), self.model.visual(patches))
        rope = text_rope(positions)
        for layer in language.layers:
            x = layer(x, rope)
        return language.norm(x)

    def drafts(self, ids: Tensor, positions: Tensor, hidden: Tensor) -> Tensor:
        """Draft states `[B, T - 1, H]`: entry i speaks of token i + 2."""
        embedded = self.model.language_model.embed_tokens(ids[:, 1:]).detach()
        rope = text_rope(positions[..., :-1])
        return self.mtp(embedded, hidden[:, :-1].detach(), rope)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.language_model.embed_tokens.weight)
