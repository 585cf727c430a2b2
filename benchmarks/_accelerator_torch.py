"""The parts of benchmarks/accelerator.py in PyTorch: transformers' models of the same sizes.

On one device, with the rows of one device; random weights, bfloat16, trained parameters float32
under autocast. torch is imported where it is needed: it may not be installed.
"""

import gc
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from _accelerator_models import SCALE, Bench, Skipped, Timing
from _accelerator_parts import (
    Sides,
    generation_flops,
    lm_flops,
    lsr_flops,
)
from _accelerator_rag import rag_flops
from _beside import llama_settings
from _work import encoder_flops

from ragjax.models.encoders import bert
from ragjax.refresh.batches import plan_batches

_RATE = 1e-5


def torch_problem(*, compiled: bool = False) -> str | None:
    """Says why PyTorch cannot be measured on the devices of JAX; None: it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch: not installed"
    if importlib.util.find_spec("transformers") is None:
        return "torch: transformers is not installed"
    import torch  # pyrefly: ignore  (not a dependency)

    platform = jax.devices()[0].platform
    if platform == "gpu" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if platform not in ("gpu", "cpu"):
        return f"torch: not measured on a {platform.upper()}"
    if compiled and platform == "cpu":
        return "torch: not compiled on a CPU, where that takes minutes"
    return None


class TorchModels:
    """Models on the device that torch has, and how they are called."""

    def __init__(self, bench: Bench, *, compiled: bool) -> None:
        """Takes the sizes.

        Raises:
            Skipped: torch cannot be measured.
        """
        if problem := torch_problem(compiled=compiled):
            raise Skipped(problem)
        import torch  # pyrefly: ignore  (not a dependency)

        self.torch, self.bench, self.compiled = torch, bench, compiled
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)

    def encoder(self) -> Any:
        """Returns a random encoder, float32."""
        from transformers import BertConfig, BertModel

        settings = bert.format_config(self.bench.sizes.encoder)
        for name in ("model_type", "architectures"):
            settings.pop(name)
        settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        with self.torch.device(self.device):
            return BertModel(BertConfig(**settings), add_pooling_layer=False)

    def lm(self) -> Any:
        """Returns a random language model, bfloat16, nothing of it trained."""
        from transformers import LlamaConfig, LlamaForCausalLM

        settings = llama_settings(self.bench.sizes.decoder)
        with self.torch.device(self.device):
            model: Any = LlamaForCausalLM(LlamaConfig(**settings, eos_token_id=None))
        return model.to(self.torch.bfloat16).requires_grad_(False)

    def tensor(self, ids: Any) -> Any:
        """Returns token ids on the device."""
        return self.torch.tensor(np.asarray(ids, np.int64), device=self.device)

    def function(self, function: Callable[..., Any], *, dynamic: bool = False) -> Any:
        """Returns a function, compiled where that is asked for."""
        if not self.compiled:
            return function
        return self.torch.compile(function, dynamic=True if dynamic else None)

    def trained(self, parameters: list[Any], loss: Callable[[], Any]) -> Callable[[], Any]:
        """Returns a step of AdamW with clipping."""
        torch = self.torch
        optimizer = torch.optim.AdamW(parameters, lr=_RATE, fused=self.device == "cuda")

        def step() -> Any:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device, dtype=torch.bfloat16):
                value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            return value

        return step

    def timed(self, run: Callable[[], Any]) -> Timing:
        """Times as `Bench.timed`, and waits for the device of torch."""

        def synchronized() -> None:
            run()
            if self.device == "cuda":
                self.torch.cuda.synchronize()

        return self.bench.timed(synchronized)

    def result(self, run: Callable[[], Any], flops: float, **counts: float) -> dict[str, Any]:
        """Times and returns what the file says."""
        return self.bench.result(self.timed(run), flops=flops, devices=1, **counts)


def torch_side(part: str, *, compiled: bool) -> Callable[[Bench], Sides]:
    """Returns what measures a part in PyTorch, eager or compiled."""
    side = "pytorch compiled" if compiled else "pytorch"

    def measure(bench: Bench) -> Sides:
        models = TorchModels(bench, compiled=compiled)
        try:
            return {side: _PARTS[part](models)}
        finally:
            gc.collect()
            if models.device == "cuda":
                models.torch.cuda.empty_cache()

    return measure


def _encode(models: TorchModels) -> dict[str, Any]:
    """As sentence-transformers: longest first, padded to the longest of the batch."""
    bench, torch = models.bench, models.torch
    texts = bench.texts[: bench.sizes.texts]
    model = models.encoder().to(torch.bfloat16).eval()
    batches = plan_batches([len(text) for text in texts], bench.encode_options)

    def embed(ids: Any, mask: Any) -> Any:
        return _pooled(torch, model(ids, attention_mask=mask).last_hidden_state, mask)

    embed = models.function(embed, dynamic=True)

    def run() -> Any:
        found = np.empty((len(texts), bench.sizes.encoder.hidden_size), np.float32)
        with torch.inference_mode():
            for batch in batches:
                longest = len(texts[batch.documents[0]])
                ids = np.zeros((len(batch.documents), longest), np.int64)
                for row, text in enumerate(batch.documents):
                    ids[row, : len(texts[text])] = texts[text]
                placed = torch.from_numpy(ids).to(models.device)
                embeddings = embed(placed, placed.ne(0))  # no text has a token of id 0
                found[batch.documents] = embeddings.float().cpu().numpy()
        return found

    flops = sum(encoder_flops(bench.sizes.encoder, 1, len(text)) for text in texts)
    return models.result(run, flops, texts=len(texts), tokens=sum(map(len, texts)))


def _pooled(torch: Any, hidden: Any, mask: Any) -> Any:
    weights = mask.unsqueeze(-1).float()
    mean = (hidden.float() * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def _answer_log_probs(torch: Any, model: Any, ids: Any, answer: int) -> Any:
    """Returns `[R, T]`, logits at the answer's positions only, as ragjax computes them."""
    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state[:, -answer:]
    logits = model.lm_head(hidden).float().flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, ids[:, -answer:].flatten(), reduction="none")
    return -losses.view(-1, answer)


def _lm_lora(models: TorchModels) -> dict[str, Any]:
    model = models.lm()
    adapters = _add_adapters(models, model)
    return _lm_step(models, model, adapters, "lora")


def _lm_top(models: TorchModels) -> dict[str, Any]:
    model = models.lm()
    top = [*model.model.layers[-models.bench.sizes.top_layers :], model.model.norm]
    for layer in top:
        layer.float().requires_grad_(True)
    return _lm_step(models, model, [p for layer in top for p in layer.parameters()], "top")


def _lm_step(models: TorchModels, model: Any, parameters: list[Any], kind: str) -> dict[str, Any]:
    sizes, torch = models.bench.sizes, models.torch
    length = sizes.lm_context + sizes.lm_answer
    ids = models.tensor(models.bench.draw(sizes.decoder.vocab_size, sizes.lm_rows, length))

    def loss() -> Any:
        return -_answer_log_probs(torch, model, ids, sizes.lm_answer).mean()

    step = models.trained(parameters, models.function(loss))
    flops = lm_flops(models.bench, kind, devices=1)
    return models.result(step, flops, steps=1, tokens=ids.numel())


def _add_adapters(models: TorchModels, model: Any) -> list[Any]:
    """Puts adapters beside all linear layers, as `ragjax.models.lora`; returns their parameters."""
    torch, rank = models.torch, models.bench.sizes.lora_rank
    parameters = []

    class Adapted(torch.nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base = base
            down = torch.randn(rank, base.in_features) * base.in_features**-0.5
            self.down = torch.nn.Parameter(down.to(models.device))
            zeros = torch.zeros(base.out_features, rank, device=models.device)
            self.up = torch.nn.Parameter(zeros)
            parameters.extend((self.down, self.up))

        def forward(self, x: Any) -> Any:
            linear = torch.nn.functional.linear
            return self.base(x) + linear(linear(x, self.down), self.up)

    for layer in model.model.layers:
        for holder in (layer.self_attn, layer.mlp):
            for name, child in list(holder.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(holder, name, Adapted(child))
    return parameters


class _Rows:
    """The random rows of a step of the retriever, or end to end."""

    def __init__(self, models: TorchModels) -> None:
        sizes, draw = models.bench.sizes, models.bench.draw
        words, count = sizes.encoder.vocab_size, sizes.questions * sizes.documents
        self.queries = models.tensor(draw(words, sizes.questions, sizes.query_tokens))
        self.docs = models.tensor(draw(words, count, sizes.doc_tokens))
        length = sizes.context_tokens + sizes.answer_tokens
        self.contexts = models.tensor(draw(sizes.decoder.vocab_size, count, length))
        own = np.repeat(np.eye(sizes.questions, dtype=bool), sizes.documents, axis=1)
        self.own = models.torch.tensor(own, device=models.device)


def _lsr(models: TorchModels) -> dict[str, Any]:
    bench, torch, rows = models.bench, models.torch, _Rows(models)
    sizes, model = bench.sizes, models.lm()
    query, doc = models.encoder().train(), models.encoder().train()
    shape = (sizes.questions, sizes.documents)

    def target() -> Any:
        log_probs = _answer_log_probs(torch, model, rows.contexts, sizes.answer_tokens)
        return log_probs.sum(-1).view(shape).softmax(-1)

    def loss(wanted: Any) -> Any:
        scores = _similarities(torch, query, doc, rows)
        # KL(target || p_R) over the documents of the batch, without the constant entropy.
        log_probs = torch.log_softmax(scores, -1)[rows.own].view(shape)
        return -(wanted * log_probs).sum(-1).mean()

    target, loss = models.function(target), models.function(loss)

    def whole() -> Any:
        with torch.no_grad():
            wanted = target()
        return loss(wanted)

    step = models.trained([*query.parameters(), *doc.parameters()], whole)
    flops = lsr_flops(bench, devices=1)
    return models.result(step, flops, steps=1, candidates=sizes.questions * sizes.documents)


def _rag(models: TorchModels) -> dict[str, Any]:
    bench, torch, rows = models.bench, models.torch, _Rows(models)
    sizes, model = bench.sizes, models.lm()
    query, doc = models.encoder().train(), models.encoder().train()
    adapters = _add_adapters(models, model)
    shape = (sizes.questions, sizes.documents)

    def loss() -> Any:
        scores = _similarities(torch, query, doc, rows)[rows.own].view(shape)
        log_probs = _answer_log_probs(torch, model, rows.contexts, sizes.answer_tokens)
        answers = log_probs.sum(-1).view(shape)
        return -torch.logsumexp(torch.log_softmax(scores, -1) + answers, -1).mean()

    parameters = [*query.parameters(), *doc.parameters(), *adapters]
    step = models.trained(parameters, models.function(loss))
    found = models.result(step, rag_flops(bench, devices=1), steps=1, questions=sizes.questions)
    return found | {"note": "the documents are given: nothing is retrieved"}


def _similarities(torch: Any, query: Any, doc: Any, rows: _Rows) -> Any:
    def embed(model: Any, ids: Any) -> Any:
        return _pooled(torch, model(ids).last_hidden_state, torch.ones_like(ids))

    return SCALE * embed(query, rows.queries) @ embed(doc, rows.docs).T


def _generate(models: TorchModels) -> dict[str, Any]:
    sizes, torch, model = models.bench.sizes, models.torch, models.lm().eval()
    ids = models.tensor(
        models.bench.draw(sizes.decoder.vocab_size, sizes.prompts, sizes.prompt_tokens)
    )
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if models.compiled:
        options["cache_implementation"] = "static"  # transformers compiles the steps on it

    def run() -> Any:
        with torch.inference_mode():
            return model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=sizes.new_tokens,
                **options,
            )

    flops = generation_flops(models.bench, devices=1)
    return models.result(run, flops, new_tokens=sizes.prompts * sizes.new_tokens)


def torch_search(bench: Bench, vectors: Any, queries: Any, size: int, ids: Any) -> dict[str, Any]:
    """Measures the same search of the same vectors, which torch reads where they are.

    Args:
        bench: Sizes.
        vectors: `[C, M, D]`.
        queries: `[B, D]`.
        size: How many vectors count.
        ids: `[B, k]` what ragjax found.
    """
    if not bench.torch:
        return {"skipped": "torch: not asked for"}
    if bench.layout.num_devices > 1:
        return {"skipped": "torch: not measured where several devices have the vectors"}
    try:
        models = TorchModels(bench, compiled=False)
    except Skipped as problem:
        return {"skipped": str(problem)}
    torch, k = models.torch, bench.sizes.k
    blocks, asked = torch.from_dlpack(vectors), torch.from_dlpack(queries)
    rows = blocks.shape[1]

    def run() -> Any:
        best: Any = None
        where: Any = None
        for number, block in enumerate(blocks):
            scores = asked @ block[: size - number * rows].T
            top = scores.topk(min(k, scores.shape[1]))
            found = top.indices + number * rows
            if best is None:
                best, where = top.values, found
                continue
            merged = torch.cat([best, top.values], 1).topk(k)
            best = merged.values
            where = torch.cat([where, found], 1).gather(1, merged.indices)
        return where

    timing = models.timed(run)
    same = [len(set(a) & set(b)) / k for a, b in zip(run().tolist(), ids.tolist(), strict=True)]
    flops = 2.0 * bench.sizes.searched * size * bench.sizes.dim
    found = bench.result(timing, flops=flops, devices=1, queries=bench.sizes.searched)
    return found | {"same_documents": float(np.mean(same))}


_PARTS: dict[str, Callable[[TorchModels], dict[str, Any]]] = {
    "encode": _encode,
    "lsr_step": _lsr,
    "lm_step_lora": _lm_lora,
    "lm_step_top": _lm_top,
    "rag_step_host": _rag,
    "generation": _generate,
}
TORCH_PARTS = tuple(_PARTS)
