"""Trains an encoder as a peer library does; a program of its own, since peers have their own world.

    python benchmarks/_peers.py JOB.json

The job is what `benchmarks/adaptation.py` writes. Needs `sentence-transformers[train]`, and for
`fedrag` also `pip install --no-deps fed-rag pydantic-settings peft` and sentence-transformers 4.
"""

import json
import sys
from pathlib import Path
from typing import Any

# Steps after which a trainer that has changed no weight is taken at its word.
_PATIENCE = 3


def main(path: str) -> None:
    """Trains what the job says and writes the encoder beside a note on what happened."""
    job = json.loads(Path(path).read_text("utf-8"))
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(job["encoder"], device=job["device"])
    model.max_seq_length = job["max_tokens"]
    train = {"mnrl": _mnrl, "mnrl_hard": _mnrl_hard, "fedrag": _fedrag}[job["system"]]
    note = train(model, job)
    model.save_pretrained(job["output"], create_model_card=False)
    Path(job["output"], "note.json").write_text(json.dumps(note), "utf-8")


def _mnrl(model: Any, job: dict[str, Any]) -> str:
    """Trains with MultipleNegativesRankingLoss on pairs of a question and a relevant passage."""
    from datasets import Dataset

    questions, passages = zip(*job["pairs"], strict=True)
    pairs = Dataset.from_dict({"anchor": list(questions), "positive": list(passages)})
    return _fit(model, pairs, job)


def _mnrl_hard(model: Any, job: dict[str, Any]) -> str:
    """Does the same with the hard negatives that the library mines, by its defaults."""
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    questions, passages = zip(*job["pairs"], strict=True)
    pairs = Dataset.from_dict({"anchor": list(questions), "positive": list(passages)})
    mined = mine_hard_negatives(
        pairs, model, corpus=job["corpus"], output_format="n-tuple", verbose=False
    )
    return _fit(model, mined, job)


def _fit(model: Any, pairs: Any, job: dict[str, Any]) -> str:
    from sentence_transformers import SentenceTransformerTrainer
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.training_args import BatchSamplers

    trainer = SentenceTransformerTrainer(
        model=model,
        args=_arguments(job, batch_sampler=BatchSamplers.NO_DUPLICATES, warmup_steps=0.1),
        train_dataset=pairs,
        loss=MultipleNegativesRankingLoss(model),
    )
    # A comparison can be stopped anywhere, and goes on from here.
    known = any(Path(f"{job['output']}-trainer").glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=known or None)
    return f"{len(pairs)} rows of {', '.join(pairs.column_names)}"


def _arguments(job: dict[str, Any], **options: Any) -> Any:
    from sentence_transformers import SentenceTransformerTrainingArguments

    return SentenceTransformerTrainingArguments(
        output_dir=f"{job['output']}-trainer",
        num_train_epochs=job["epochs"],
        per_device_train_batch_size=job["batch_size"],
        learning_rate=job["learning_rate"],
        seed=job["seed"],
        use_cpu=job["device"] == "cpu",
        save_strategy="steps",
        save_steps=4,
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        **options,
    )


def _fedrag(model: Any, job: dict[str, Any]) -> str:
    """Trains with FedRAG's LM-supervised retrieval, whose trainer is called as it documents."""
    import torch
    from datasets import Dataset
    from fed_rag import RAGConfig, RAGSystem
    from fed_rag.data_structures import KnowledgeNode, NodeType
    from fed_rag.generators.huggingface import HFPretrainedModelGenerator
    from fed_rag.knowledge_stores import InMemoryKnowledgeStore
    from fed_rag.retrievers.huggingface import HFSentenceTransformerRetriever
    from fed_rag.trainers.huggingface.lsr import HuggingFaceTrainerForLSR

    retriever = HFSentenceTransformerRetriever(model_name=job["encoder"], load_model_at_init=False)
    retriever._encoder = model
    embeddings = model.encode(job["corpus"], batch_size=32).tolist()
    nodes = [
        KnowledgeNode(embedding=embedding, node_type=NodeType.TEXT, text_content=text)
        for embedding, text in zip(embeddings, job["corpus"], strict=True)
    ]
    system = RAGSystem(
        knowledge_store=InMemoryKnowledgeStore.from_nodes(nodes),
        generator=HFPretrainedModelGenerator(model_name=job["lm"]),
        retriever=retriever,
        rag_config=RAGConfig(top_k=job["documents"]),
    )
    questions, answers = zip(*job["answers"], strict=True)
    trainer = HuggingFaceTrainerForLSR(
        rag_system=system,
        train_dataset=Dataset.from_dict({"query": list(questions), "response": list(answers)}),
        training_arguments=_arguments(job, remove_unused_columns=False),
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def changed() -> bool:
        now = model.state_dict()
        return any(not torch.equal(value, now[name]) for name, value in before.items())

    steps = trainer.hf_trainer_obj
    steps.add_callback(_stop_where_nothing_learns(changed))
    trainer.train()
    taken = steps.state.global_step
    return f"{taken} steps; weights {'changed' if changed() else 'bit-identical to before'}"


def _stop_where_nothing_learns(changed: Any) -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        """Ends a training that has not moved a weight, which no further step would."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Looks at the weights after the first few steps."""
            if state.global_step == _PATIENCE and not changed():
                control.should_training_stop = True

    return Stop()


if __name__ == "__main__":
    main(sys.argv[1])
