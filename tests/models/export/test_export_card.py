"""The model card of an exported encoder: what is known, what is not, the way to load it."""

import dataclasses
import logging

import yaml

from ragjax.models.export import export_encoder
from ragjax.models.export.base import read_base
from ragjax.models.export.card import Card, Use, format_card
from ragjax.models.testing import tiny_encoder


def header_of(folder):
    text = (folder / "README.md").read_text("utf-8")
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_says_what_is_known_and_that_the_rest_is_not(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        export_encoder(tiny_encoder(), tmp_path / "out")
    assert "tiny_encoder(0): its files declare no licence" in caplog.text
    assert header_of(tmp_path / "out") == {
        "license": "unknown",
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "sentence-similarity", "ragjax"],
    }
    text = (tmp_path / "out" / "README.md").read_text("utf-8")
    for absent in (
        "Licence: unknown",
        "Nothing is recorded about the data",
        "No recipe is recorded",
        "This export comes with no measurement",
        "None are recorded, which does not mean that there are none",
    ):
        assert absent in text
    caplog.clear()
    export_encoder(tiny_encoder(), tmp_path / "licensed", card=Card(license="mit"))
    assert header_of(tmp_path / "licensed")["license"] == "mit" and not caplog.records


def test_a_card_holds_data_recipe_metrics_and_the_way_to_load(tmp_path):
    before = {"recall@5": {"value": 0.5, "low": 0.41, "high": 0.59}, "n": 40}
    after = {"recall@5": {"value": 0.75, "low": 0.66, "high": 0.83}, "mrr@10": None, "n": 40}
    card = Card(
        data="Questions on owls.",
        recipe={
            "seed": 3,
            "retriever": {"rounds": 2},
            "data": "/home/owl/secret/owls",
            "lm": "o/w",
            "prompt": {"template": "/no_think {question}"},
        },
        metrics={"before": before, "after": after},
        columns=("recall@5", "recall@20"),
        metrics_note="Forty questions.",
        limitations=("Owls only.",),
    )
    encoder = dataclasses.replace(tiny_encoder(), query_prefix="ask: ")
    export_encoder(encoder, tmp_path / "out", card=card)
    text = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "| system | recall@5 |\n| --- | --- |\n| before | 0.500 [0.410, 0.590] |\n" in text
    assert "| after | 0.750 [0.660, 0.830] |\n\nForty questions." in text
    assert "`experiments/adapt.py` of ragjax, with these options" in text
    assert (
        '"data": "owls"' in text
        and '"lm": "o/w"' in text
        and "/no_think" in text
        and "secret" not in text
    )
    assert '"rounds": 2' in text and "Questions on owls." in text and "- Owls only." in text
    for code in (
        'SentenceTransformer("FOLDER")',
        'model.encode(texts, prompt_name="query")',
        'load_encoder("FOLDER")',
    ):
        assert code in text


def test_only_an_id_on_the_hub_stands_in_the_header(tmp_path):
    text = "ORG/NAME@main"
    base = read_base("pip:nothing==1")._replace(source=text, hub_id="ORG/NAME", license="mit")
    use = Use("transformers", "text-generation", (), "A model.", {})
    card = format_card(Card(), base, use, kind="a model")
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "ORG/NAME"
    assert "Base model: `ORG/NAME@main`. Licence: mit, as the base model declares." in card
