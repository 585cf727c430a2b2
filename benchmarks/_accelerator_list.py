"""The parts of benchmarks/accelerator.py, in their order."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import _accelerator_parts as parts
import _accelerator_rag as rag
from _accelerator_models import Bench
from _accelerator_parts import Sides
from _accelerator_torch import TORCH_PARTS, torch_side

_SCORED = "logits at the answer's positions only"

PARTS = {
    "encode": {
        "what": "texts of log-normal lengths, token ids in host memory to embeddings there",
        "flops": "2 x parameters of the layers x tokens + attention; padding not counted",
    },
    "lsr_step": {
        "what": "the language model scores K candidates a question, both encoders are updated",
        "flops": f"2 x parameters x tokens of the language model ({_SCORED}) + 6 x parameters x"
        " tokens of the encoders; what is computed again not counted",
    },
    "lm_step_lora": {
        "what": "adapters on all layers of the frozen language model",
        "flops": f"4 x parameters x tokens ({_SCORED}): no gradient of frozen weights; 6 x of the"
        " adapters",
    },
    "lm_step_top": {
        "what": "the top layers of the language model",
        "flops": f"2 x parameters x tokens ({_SCORED}) + 2 x of the unembedding + 4 x of the"
        " layers that are trained",
    },
    "rag_step_host": {
        "what": "end to end: both encoders and adapters; documents found during the step before",
        "flops": "4 x parameters x tokens of the language model (6 x of the adapters) + 6 x of the"
        " encoders; retrieval not counted",
    },
    "refresh": {
        "what": "the same steps, without and during asynchronous re-indexing of all documents",
        "flops": None,
    },
    "rag_step_callback": {
        "what": "end to end, the compiled step calls back to the host for its documents",
        "flops": "as rag_step_host",
    },
    "generation": {
        "what": "greedy decoding with a cache",
        "flops": "2 x parameters x tokens, of the prompts and the new ones",
    },
    "search_small": {
        "what": "exact search, float32 at full precision",
        "flops": "2 x queries x vectors x dimensions; the peak is that of 16 bits",
    },
    "search_large": {"what": "as search_small", "flops": "as search_small"},
    "checkpoints": {
        "what": "steps of lm_step_lora in the loop of a run, before: each is saved and waited for;"
        " after: every two minutes in the background (none in what is timed); after_while_writing:"
        " one after the other in the background",
        "flops": None,
    },
    "compile_cache": {
        "what": "seconds to trace and compile the step of lm_step_lora, before: from nothing;"
        " after: with the folder of compiled programs",
        "flops": None,
    },
    "encoder_batches": {
        "what": "encode, before: batches of 64 rows at most; after: by tokens",
        "flops": "as encode",
    },
    "adapters": {
        "what": "generation, before: adapters beside the weights; after: folded into them",
        "flops": "as generation",
    },
}


class Entry(NamedTuple):
    """What is measured in one go."""

    part: str
    sides: tuple[str, ...]
    seconds: float  # that it is expected to take at full size, compilation included
    run: Callable[[Bench], Sides]
    torch: bool = False


_OURS, _BOTH, _TURNS = ("ragjax",), ("ragjax", "pytorch"), ("before", "after")
# Of what JAX once had of a GPU's memory nothing comes back: the largest part goes after those that
# leave PyTorch little room. Compiling with torch takes longest and comes last.
ENTRIES = (
    Entry("encode", _OURS, 20, parts.encode),
    Entry("lsr_step", _OURS, 20, parts.lsr_step),
    Entry("lm_step_lora", _OURS, 15, parts.lm_step_lora),
    Entry("lm_step_top", _OURS, 12, parts.lm_step_top),
    Entry("rag_step_host", _OURS, 25, rag.rag_step_host),
    Entry("refresh", ("without", "during"), 8, rag.refresh),
    Entry("rag_step_callback", _OURS, 20, rag.rag_step_callback),
    Entry("generation", _OURS, 8, parts.generation),
    Entry("search_small", _BOTH, 4, functools.partial(parts.search, number=0)),
    Entry("checkpoints", (*_TURNS, "after_while_writing"), 12, parts.checkpoints),
    Entry("compile_cache", _TURNS, 4, parts.compile_cache),
    Entry("encoder_batches", _TURNS, 15, parts.encoder_batches),
    Entry("adapters", _TURNS, 10, parts.adapters),
    *(Entry(part, ("pytorch",), 5, torch_side(part, compiled=False), True) for part in TORCH_PARTS),
    Entry("search_large", _BOTH, 10, functools.partial(parts.search, number=1)),
    *(
        Entry(part, ("pytorch compiled",), 25, torch_side(part, compiled=True), True)
        for part in TORCH_PARTS
    ),
)
