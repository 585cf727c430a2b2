"""Each mistake ends with code 2 and one sentence, before anything expensive."""

import csv
import importlib
import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from programs import load_script
from safetensors.numpy import load_file, save_file

from ragjax.runs import AdaptConfig, EvaluateConfig, RagConfig
from ragjax.runs.folder import claim, config_record
from ragjax.runs.options.refresh import RefreshConfig
from ragjax.runs.program import flag_names, parse_flags, run_program


@pytest.fixture(scope="module")
def script():
    return load_script("experiments/adapt.py")


@pytest.fixture
def refuse(script, tiny_inputs, tmp_path, capsys, monkeypatch):
    """Runs the script with changed inputs; returns its one line of error."""

    def expensive(*_args, **_kwargs):
        raise AssertionError("the run went on to its expensive part")

    module = importlib.import_module("ragjax.runs.adapt")  # its name in the package is a function
    monkeypatch.setattr(module, "estimate_cost", expensive)

    def check(*flags, **changed):
        inputs = {**tiny_inputs, "output": str(tmp_path / "out"), **changed}
        fitting = "--language_model.train_layers=1"
        code = script.main([fitting, *(f"--{k}={v}" for k, v in inputs.items()), *flags])
        error = capsys.readouterr().err.strip().splitlines()
        assert code == 2, error
        assert "Traceback" not in "\n".join(error)
        return error[-1]

    return check


@pytest.fixture
def domain(tmp_path, write_domain):
    return write_domain(tmp_path / "domain")


def append(path, *lines):
    with open(path, "a") as file:
        file.writelines(line + "\n" for line in lines)


def copy(source, tmp_path):
    return Path(shutil.copytree(source, tmp_path / "model"))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_b1_a_missing_folder_gets_the_nearest_name(refuse, domain):
    assert "domain" in refuse(data=str(domain.with_name("domian")))


def test_b1_a_file_of_something_else(refuse, domain):
    said = refuse(data=str(domain / "qrels" / "train.tsv"))
    assert "train.tsv:2: no field '_id' (the id) and 'text'" in said and "'query-id'" in said


def test_b2_an_empty_corpus(refuse, domain):
    (domain / "corpus.jsonl").write_text("")
    assert "0 passages" in refuse(data=str(domain))


def test_b2_no_training_questions(refuse, domain):
    judged = {
        line.split("\t")[0]
        for split in ("dev", "test")
        for line in (domain / "qrels" / f"{split}.tsv").read_text().splitlines()
    }
    lines = (domain / "queries.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["_id"] in judged]
    (domain / "queries.jsonl").write_text("".join(kept))
    (domain / "qrels" / "train.tsv").unlink()
    said = refuse("--questions.passages=0", data=str(domain))
    assert "there are no training questions" in said and "have them written" in said


def test_questions_that_are_not_there_are_named_before_anything_expensive(refuse, tmp_path):
    assert "none.jsonl does not exist" in refuse(f"--questions.file={tmp_path / 'none.jsonl'}")
    bad = "--questions.template=a question:"
    other = str(tmp_path / "other")
    said = refuse("--questions.passages=3", bad, output=other)
    assert "neither a text with {passage} nor a file" in said


def test_b3_a_broken_line_is_named(refuse, domain):
    append(domain / "corpus.jsonl", '{"_id": "x", "text": ')
    assert "corpus.jsonl:81" in refuse(data=str(domain))


def test_b3_text_that_is_not_utf8(refuse, domain):
    with open(domain / "corpus.jsonl", "ab") as file:
        file.write(b'{"_id": "x", "text": "\xff"}\n')
    assert "corpus.jsonl:81" in refuse(data=str(domain))


def test_b4_wrong_field_names_are_shown_with_the_flag(refuse, domain):
    text = (domain / "corpus.jsonl").read_text().replace('"text"', '"words"')
    (domain / "corpus.jsonl").write_text(text)
    message = refuse(data=str(domain))
    assert "words" in message and "fields" in message


def test_b4_the_flag_that_names_fields_is_read(refuse, domain):
    message = refuse("--data_options.fields=text", data=str(domain))
    assert "expected id=docid,text=contents" in message


def test_b5_duplicate_ids_name_both_places(refuse, domain):
    append(domain / "corpus.jsonl", '{"_id": "red-cat", "text": "again"}')
    message = refuse(data=str(domain))
    assert "red-cat" in message and "81" in message


def test_b6_a_number_and_its_text_are_one_id(refuse, domain):
    append(domain / "corpus.jsonl", '{"_id": 7, "text": "a"}', '{"_id": "7", "text": "b"}')
    message = refuse(data=str(domain))
    assert "7" in message and "82" in message


def test_b10_qrels_that_name_unknown_passages(refuse, domain):
    append(domain / "qrels" / "test.tsv", "q2\tnowhere\t1")
    assert "nowhere" in refuse(data=str(domain))


def test_b13_a_tokenizer_larger_than_the_model(refuse, tiny_inputs, tmp_path):
    folder = copy(tiny_inputs["lm"], tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["zz"] = 100_000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "100000" in refuse(lm=str(folder)).replace(",", "")


def test_a_missing_score_cache_is_found_before_anything_is_computed(refuse, tmp_path):
    assert "no such file" in refuse(f"--score_cache={tmp_path / 'none.jsonl'}")


def test_a_damaged_score_cache_is_found_before_anything_is_computed(refuse, tmp_path):
    (tmp_path / "scores.jsonl").write_text('{"key": "a", "checksum": "b"}\n')
    message = refuse(f"--score_cache={tmp_path / 'scores.jsonl'}")
    assert "--score_cache " in message and "scores.jsonl:1: not a whole Score" in message


def test_more_layers_than_the_model_has_gives_the_numbers(refuse):
    assert "99" in (message := refuse("--language_model.train_layers=99"))
    assert "3 layers" in message


def test_devices_that_are_not_there_are_named_before_anything_is_read(refuse):
    message = refuse("--refresh.mode=async", "--refresh.devices=8", data="nowhere")
    assert "--refresh.devices 8: there are 8 local devices" in message


def test_b16_a_prompt_without_room_gives_the_numbers(refuse):
    message = refuse("--prompt.answer_tokens=512")
    assert "512" in message


def test_b17_an_unknown_architecture_lists_the_known_ones(refuse, tiny_inputs, tmp_path):
    folder = copy(tiny_inputs["lm"], tmp_path)
    edit_json(folder / "config.json", model_type="mamba")
    message = refuse(lm=str(folder))
    assert "mamba" in message and "llama" in message


def test_b17_remote_code_is_refused(refuse, tiny_inputs, tmp_path):
    folder = copy(tiny_inputs["encoder"], tmp_path)
    edit_json(folder / "config.json", auto_map={"AutoModel": "evil.Model"})
    assert "auto_map" in refuse(encoder=str(folder))


def test_b17_pytorch_files_only_says_how_to_convert(refuse, tiny_inputs, tmp_path):
    folder = copy(tiny_inputs["lm"], tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refuse(lm=str(folder))
    assert "pytorch_model.bin" in message
    assert "weights_only=True" in message and "save_file" in message


def test_b18_tensors_that_are_missing_are_named(refuse, tiny_inputs, tmp_path):
    folder = copy(tiny_inputs["lm"], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[3]
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    assert name.split(".")[-2] in refuse(lm=str(folder))


def test_b18_tensors_of_another_shape_are_named(refuse, tiny_inputs, tmp_path):
    folder = copy(tiny_inputs["lm"], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = np.ones(7, np.float32)
    save_file(tensors, folder / "model.safetensors")
    message = refuse(lm=str(folder))
    assert "model.norm.weight" in message and "7" in message


@pytest.mark.parametrize("model", ["lm", "encoder"])
def test_b18_weights_that_are_not_finite_are_named(refuse, tiny_inputs, tmp_path, model):
    folder = copy(tiny_inputs[model], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    sorted(tensors.items())[2][1].flat[0] = np.nan
    save_file(tensors, folder / "model.safetensors")
    message = refuse(**{model: str(folder)})
    assert f"--{model}" in message and "1 arrays of its weights hold NaN" in message


@pytest.mark.parametrize(
    "flag,field",
    [
        ("--retriever.temperature=0", "temperature"),
        ("--retriever.learning_rate=-1e-5", "learning_rate"),
        ("--language_model.warmup_fraction=2", "warmup_fraction"),
        ("--retriever.candidates=0", "candidates"),
        ("--evaluation.documents=0", "documents"),
        ("--retriever.objective=lsr", "negatives"),
    ],
)
def test_b20_b25_values_out_of_range(script, tiny_flags, tmp_path, capsys, flag, field):
    try:
        code = script.main([*tiny_flags, f"--output={tmp_path / 'out'}", flag])
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr()
    assert code == 2 and field in error.err + error.out
    assert "Traceback" not in error.err
    assert not (tmp_path / "out").exists()


def test_b26_a_misspelt_flag_gets_a_suggestion(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--retriever.lerning_rate=1e-4"])
    assert end.value.code == 2
    assert "learning" in capsys.readouterr().err


def test_b26_a_misspelt_key_in_a_config_file(refuse, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("retriever:\n  learning_rate: 1e-4\n  epoch: 2\n")
    assert "did you mean retriever.epochs?" in refuse(config=str(path))


def test_flags_override_the_config_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("seed: 5\nretriever:\n  learning_rate: 1e-4\n")
    options = parse_flags(AdaptConfig(), None, [f"--config={path}", "--seed=6"]).options
    assert options.seed == 6 and options.retriever.learning_rate == 1e-4


def test_b29_a_folder_with_something_else_is_left_alone(refuse, tmp_path):
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("x")
    message = refuse(output=str(other))
    assert "chapter1.tex" in message and "--output" in message


def test_b29_a_run_with_other_options_is_not_overwritten(refuse, script, tiny_inputs, tmp_path):
    config = AdaptConfig(**tiny_inputs, seed=1)
    output = tmp_path / "run"
    output.mkdir()
    text = json.dumps(config_record(config, config.fingerprint(), mode="concat"))
    (output / "config.json").write_text(text)
    message = refuse("--seed=2", output=str(output))
    assert "seed: 1 there, 2 here" in message
    assert (output / "config.json").read_text() == text


def test_input_that_was_refused_does_not_block_the_next_try(refuse, domain, tmp_path, script):
    (domain / "corpus.jsonl").unlink()
    refuse(data=str(domain))
    config = AdaptConfig(output=str(tmp_path / "out"))
    with claim(config, config_record(config, config.fingerprint(), mode="concat"), None):
        pass


def test_a_run_whose_index_is_lost_goes_on_as_its_error_advises(tmp_path):
    def taken(adopt_after, **changed):
        refresh = RefreshConfig(mode="async", adopt_after=adopt_after)
        config = RagConfig(output=str(tmp_path), refresh=refresh, **changed)
        record = config_record(config, config.fingerprint(), mode="concat")
        with claim(config, record, None):
            (tmp_path / "config.json").write_text(json.dumps(record))

    taken(2)
    with pytest.raises(ValueError, match="refresh.adopt_after: 2 there, 3 here"):
        taken(3)
    with pytest.raises(ValueError, match="seed: 0 there, 1 here"):
        taken(-1, seed=1)
    taken(-1)
    with pytest.raises(ValueError, match="refresh.adopt_after: -1 there, 2 here"):
        taken(2)


def test_b7_b9_b14_b15_what_can_be_used_is_used_and_said(
    script, tiny_inputs, tmp_path, capsys, write_domain
):
    domain = write_domain(tmp_path / "domain")
    append(domain / "corpus.jsonl", '{"_id": "blank", "text": " \\u200b "}')
    append(
        domain / "corpus.jsonl",
        *(json.dumps({"_id": f"long{i}", "text": "word " * 60}) for i in range(8)),
    )
    rows = [json.loads(line) for line in (domain / "corpus.jsonl").read_text().splitlines()]
    with open(domain / "corpus.csv", "w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerows([["docid", "body"], *([row["_id"], row["text"]] for row in rows)])
    (domain / "corpus.jsonl").unlink()
    folder = copy(tiny_inputs["lm"], tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("pad_token_id", None)
    (folder / "config.json").write_text(json.dumps(settings))
    code = script.main(
        [
            f"--data={domain}",
            f"--encoder={tiny_inputs['encoder']}",
            f"--lm={folder}",
            f"--output={tmp_path / 'run'}",
            "--dry_run",
            "--language_model.train_layers=1",
        ]
    )
    out = capsys.readouterr().out
    assert code == 0
    assert "1 passages without text or title are skipped" in out
    assert "corpus.csv: cells separated by semicolons" in out
    assert "the id is read from 'docid'; the text is read from 'body'" in out
    assert "longer than 64 tokens and were cut" in out
    assert "documents to encode" in out


def test_more_candidates_than_documents_are_masked(rng):
    from ragjax.index import ExactIndex

    found = ExactIndex(rng.normal(size=(3, 4)).astype(np.float32)).search(np.ones((1, 4)), 5)
    assert found.mask.tolist() == [[True] * 3 + [False] * 2]
    with pytest.raises(ValueError, match="k must be a positive integer, got 0"):
        ExactIndex(np.ones((3, 4), np.float32)).search(np.ones((1, 4)), 0)


def test_b21_embeddings_of_another_size_show_the_numbers():
    from ragjax.index import ExactIndex

    with pytest.raises(ValueError, match="size 5 but the index was built with size 4"):
        ExactIndex(np.ones((3, 4), np.float32)).search(np.ones((1, 5), np.float32), 2)


@pytest.mark.parametrize(
    "config",
    [AdaptConfig(), RagConfig(), EvaluateConfig()],
    ids=lambda config: type(config).__name__,
)
def test_a_device_without_room_is_named_with_flags_that_need_less(config, capsys):
    def fill(options, *, stop, log):
        return jnp.zeros(2**50, jnp.uint8).block_until_ready()

    assert run_program(fill, config, None, []) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: a device has no room left (RESOURCE_EXHAUSTED: Out of memory")
    assert said.count("\n") == 1
    named = set(re.findall(r"--(\w+)", said))
    assert len(named) == 3 and named <= flag_names(config)
