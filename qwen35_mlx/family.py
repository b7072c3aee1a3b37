"""The eight sizes of Qwen3.5: names, shapes, what they weigh and how their authors sample them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InputError, ModelError
from .sampling import Sampling

HEAD_DIM = 256
LINEAR_HEAD_DIM = 128
# Layer i is full attention if i + 1 divides by this, else a gated delta net.
FULL_ATTENTION_INTERVAL = 4
# What a prompt and its answer are taken to need when a size is suggested.
_TYPICAL_TOKENS = 8192


@dataclass(frozen=True)
class Modes:
    """What the model card advises for each way of use."""

    thinking: Sampling
    thinking_vision: Sampling
    precise_coding: Sampling  # while thinking
    instruct: Sampling
    instruct_vision: Sampling
    instruct_reasoning: Sampling


@dataclass(frozen=True)
class Size:
    """One size of the family: what tells it from the others, and what its memory follows from.

    num_experts: 0 on dense sizes. parameters: without the MTP head, which has `mtp_parameters`.
    mlx_4bit_bytes, mlx_8bit_bytes, mlx_bf16_bytes: of all tensors of a folder in mlx-community's
    form, without safetensors headers and without MTP.
    """

    name: str
    hidden_size: int
    num_hidden_layers: int
    num_experts: int
    num_key_value_heads: int
    linear_num_value_heads: int
    parameters: int
    mtp_parameters: int
    mlx_4bit_bytes: int
    mlx_8bit_bytes: int
    mlx_bf16_bytes: int
    modes: Modes

    @property
    def hf_id(self) -> str:
        """Repository of the original weights."""
        return f"Qwen/Qwen3.5-{self.name}"

    @property
    def mlx_id(self) -> str:
        """Repository of mlx-community's 4-bit conversion."""
        return f"mlx-community/Qwen3.5-{self.name}-4bit"

    @property
    def full_attention_layers(self) -> int:
        return self.num_hidden_layers // FULL_ATTENTION_INTERVAL

    @property
    def mtp_kv_bytes_per_token(self) -> int:
        """Keys and values of one attention layer, bf16: what the MTP head adds per token."""
        return 2 * self.num_key_value_heads * HEAD_DIM * 2

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of the language model, bf16."""
        return self.full_attention_layers * self.mtp_kv_bytes_per_token

    @property
    def state_bytes(self) -> int:
        """Recurrent states of one sequence, f32, whatever its length."""
        layers = self.num_hidden_layers - self.full_attention_layers
        return layers * self.linear_num_value_heads * LINEAR_HEAD_DIM**2 * 4


# min_p is 0 and repetition_penalty 1 in all of them.
_CALM = Sampling(temperature=0.6, top_p=0.95, top_k=20, presence_penalty=0.0)
_FREE = Sampling(temperature=1.0, top_p=0.95, top_k=20, presence_penalty=1.5)
_BRIEF = Sampling(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5)
_WIDE = Sampling(temperature=1.0, top_p=1.0, top_k=20, presence_penalty=2.0)
# The cards of 0.8B and 2B have rows for pictures and none for reasoning without thinking; those
# of the others the reverse. A missing row is the general one of its mode.
_SMALL = Modes(_FREE, _CALM, _CALM, _WIDE, _BRIEF, _WIDE)
_LARGE = Modes(_FREE, _FREE, _CALM, _BRIEF, _BRIEF, _FREE)

# Bytes at 4 bits are published for 9B and up, at 8 bits for 2B, 9B and up, at bf16 for 122B-A10B;
# the others follow by the same rule, which tests/test_family.py holds.
# fmt: off
SIZES = (
    #    name, hidden, layers, experts, KV heads, v heads, parameters, of MTP,
    #    bytes at 4 bits, 8 bits, bf16, modes
    Size("0.8B",      1024, 24, 0,   2, 16, 852_985_920,     20_452_864,
         625_124_032,     1_001_071_296,   1_705_972_416,   _SMALL),
    Size("2B",        2048, 24, 0,   2, 16, 2_213_241_664,   60_828_160,
         1_722_149_056,   2_662_787_264,   4_426_483_904,   _SMALL),
    Size("4B",        2560, 32, 0,   4, 32, 4_539_265_536,   120_599_552,
         3_034_147_328,   5_136_542_208,   9_078_532_608,   _LARGE),
    Size("9B",        4096, 32, 0,   4, 32, 9_409_813_744,   243_290_624,
         5_950_062_560,   10_426_433_504,  18_819_629_024,  _LARGE),
    Size("27B",       5120, 64, 0,   4, 48, 27_356_728_560,  424_699_392,
         16_054_266_848,  29_500_943_328,  54_713_461_728,  _LARGE),
    Size("35B-A3B",   2048, 40, 256, 2, 32, 35_107_181_936,  844_640_768,
         20_391_405_152,  37_721_130_592,  70_214_365_792,  _LARGE),
    Size("122B-A10B", 3072, 48, 256, 2, 64, 122_562_817_776, 2_523_679_232,
         69_593_314_272,  130_648_036_320, 245_125_640_160, _LARGE),
    Size("397B-A17B", 4096, 60, 512, 2, 64, 396_802_360_816, 6_595_568_128,
         223_860_768_352, 422_032_580_192, 793_604_727_392, _LARGE),
)
# fmt: on

# For a model whose authors' advice is not known, such as a small demonstration model: without
# calibration to trust, the most likely token is the one choice that is the model's alone, and two
# runs agree. Whoever raises only the temperature gets the family's usual limits with it.
UNKNOWN = Sampling(temperature=0.0)


def find(name: str) -> Size | None:
    """The size called `name` in any case: `4B`, `35b-a3b`, `35b`, `Qwen3.5-4B`; else None.

    A Hub id with its owner is no size name: it means that very repository.
    """
    short = name.strip().lower().removeprefix("qwen3.5-")
    for size in SIZES:
        whole = size.name.lower()
        if short in (whole, whole.split("-")[0]):
            return size
    return None


def identify(hidden_size: int, num_hidden_layers: int, num_experts: int = 0) -> Size | None:
    """The size of these shapes (`num_experts` 0 if dense), which differ among all eight."""
    for size in SIZES:
        shapes = (size.hidden_size, size.num_hidden_layers, size.num_experts)
        if shapes == (hidden_size, num_hidden_layers, num_experts):
            return size
    return None


def recommended(size: Size | None, thinking: bool, vision: bool = False) -> Sampling:
    """What the model card advises; `UNKNOWN` for None. vision: the prompt has a picture or clip.

    Other ways of use (precise coding, reasoning without thinking) are in `size.modes`.
    """
    if size is None:
        return UNKNOWN
    if thinking:
        return size.modes.thinking_vision if vision else size.modes.thinking
    return size.modes.instruct_vision if vision else size.modes.instruct


def from_generation_config(values: Mapping[str, Any], where: str) -> Sampling | None:
    """What a folder's generation_config.json says about sampling; None if nothing.

    For models that are none of the eight: for those the card's advice depends on the mode, which
    the file cannot say. Values left out are transformers' defaults. `do_sample: false` is greedy;
    values without `do_sample` count, as in vLLM (transformers would ignore them).

    values: the parsed file. where: its path, for the message.
    Raises: ModelError for a value out of range.
    """
    names = (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "repetition_penalty",
    )
    given = {name: values[name] for name in names if values.get(name) is not None}
    sample = values.get("do_sample")
    if sample is False:
        return UNKNOWN
    if not given and sample is None:
        return None
    try:
        return Sampling(**{"temperature": 1.0, "top_p": 1.0, "top_k": 50, **given})
    except InputError as error:
        raise ModelError(f"{where}: {error}") from error


def fits_advice(available: int) -> str:
    """A sentence for someone whose model does not fit: the largest size that does, at 4 bits.

    available: bytes for weights, state and an 8,192-token conversation.
    """
    needs = [
        (s.mlx_4bit_bytes + s.state_bytes + _TYPICAL_TOKENS * s.kv_bytes_per_token, s)
        for s in SIZES
    ]
    fitting = [(need, size) for need, size in needs if need <= available]
    if not fitting:
        need, size = needs[0]
        return f"Free some memory: the smallest, {size.name} at 4 bits, needs {need / 1e9:.1f} GB."
    need, size = max(fitting, key=lambda pair: pair[1].parameters)
    return f"The largest that fits is {size.name} at 4 bits ({need / 1e9:.1f} GB)."
