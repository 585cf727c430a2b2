"""Every family of text encoders against PyTorch: the same folder, embeddings and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.models import Tokens, load_encoder
from ragjax.models.encoder import FAMILIES
from ragjax.models.files.key_table import named_tensors
from ragjax.models.testing import tiny_encoder

torch = pytest.importorskip("torch", reason="needs the [parity] extra")
transformers = pytest.importorskip("transformers", reason="needs the [parity] extra")

VOCAB = 60
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
LARGER = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
}
# The class of the model, of its configuration, its fields beyond the sizes, and the pooling.
BERT = {"max_position_embeddings": 24, "type_vocab_size": 2, "pad_token_id": 0}
ROBERTA = {"max_position_embeddings": 26, "type_vocab_size": 1, "pad_token_id": 1}
MODERN = {
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "local_attention": 8,
    "bos_token_id": None,
    "eos_token_id": None,
    "cls_token_id": None,
    "sep_token_id": None,
}
DECODER = {
    "max_position_embeddings": 24,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
CASES = {
    "bert": ("BertModel", "BertConfig", SMALL | BERT, "mean"),
    "bert larger": (
        "BertModel",
        "BertConfig",
        LARGER | BERT | {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
        "cls",
    ),
    "dpr question": (
        "DPRQuestionEncoder",
        "DPRConfig",
        SMALL | BERT | {"projection_dim": 12},
        None,
    ),
    "dpr context": ("DPRContextEncoder", "DPRConfig", LARGER | BERT, None),
    "roberta": ("RobertaModel", "RobertaConfig", SMALL | ROBERTA, "mean"),
    "xlm-roberta": (
        "XLMRobertaModel",
        "XLMRobertaConfig",
        LARGER | ROBERTA | {"layer_norm_eps": 1e-5},
        "cls",
    ),
    "camembert": ("CamembertModel", "CamembertConfig", SMALL | ROBERTA, "mean"),
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        SMALL | MODERN | {"num_hidden_layers": 4},
        "mean",
    ),
    "modernbert larger": (
        "ModernBertModel",
        "ModernBertConfig",
        LARGER
        | MODERN
        | {
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "local_attention": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        },
        "cls",
    ),
    "qwen3": ("Qwen3Model", "Qwen3Config", SMALL | DECODER, None),
    "mistral": (
        "MistralModel",
        "MistralConfig",
        LARGER | DECODER | {"sliding_window": 5},
        None,
    ),
}


@pytest.fixture(autouse=True)
def quiet():
    """No progress bars and reports of transformers among the test results."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def torch_model(name):
    """Random weights in every parameter, biases and norms too."""
    model_class, config_class, fields, _ = CASES[name]
    torch.manual_seed(len(name))
    config = getattr(transformers, config_class)(**fields)
    extra = {"add_pooling_layer": False} if "add_pooling_layer" in _arguments(model_class) else {}
    model = getattr(transformers, model_class)(config, **extra).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(float("norm" in key.lower() and key.endswith("weight")), 0.2)
    return model


def _arguments(model_class):
    return getattr(transformers, model_class).__init__.__code__.co_varnames


def write_folder(model, folder):
    model.save_pretrained(folder)
    tiny_encoder().tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def batch(pad_id, length=20):
    """Texts of several lengths, longer than any local window."""
    rng = np.random.default_rng(0)
    mask = np.arange(length)[None] < np.array([[length], [9], [2], [1]])
    ids = np.where(mask, rng.integers(4, VOCAB, mask.shape), pad_id)
    return ids.astype(np.int32), mask


def torch_embeddings(model, ids, mask, pooling):
    outputs = model(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long())
    if hasattr(model, "question_encoder") or hasattr(model, "ctx_encoder"):
        return outputs.pooler_output
    hidden, mask = outputs.last_hidden_state, torch.tensor(mask)
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "mean":
        return (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    return hidden[torch.arange(len(mask)), mask.sum(1) - 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_embeddings_and_gradients_equal_pytorch(name, tmp_path):
    model, pooling = torch_model(name), CASES[name][3]
    encoder = load_encoder(write_folder(model, tmp_path), pooling=pooling)
    ids, mask = batch(CASES[name][2]["pad_token_id"])
    expected = torch_embeddings(model, ids, mask, pooling)
    weights = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    loss = (expected * torch.tensor(weights)).sin().mean()
    loss.backward()

    def scalar(params):
        embeddings = encoder.encode(params, Tokens(jnp.asarray(ids), jnp.asarray(mask)))
        return jnp.sin(embeddings * weights).mean(), embeddings

    run = jax.jit(jax.grad(scalar, has_aux=True))
    gradient, embeddings = run(encoder.params)
    assert embeddings.shape == expected.shape == (4, encoder.embedding_size)
    np.testing.assert_allclose(embeddings, expected.detach().numpy(), atol=1e-4)
    found = named_tensors(gradient, encoder.family.key_table(encoder.config))
    compared = 0
    for key, parameter in model.named_parameters():
        reference = np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()
        np.testing.assert_allclose(
            found[encoder.family.canonical_key(key)], reference, atol=1e-3, rtol=1e-3, err_msg=key
        )
        compared += 1
    assert compared == len(found) and np.abs(embeddings).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_configuration_and_tensors_go_back_exactly(name, tmp_path):
    """What is written from the loaded encoder is what PyTorch wrote."""
    model = torch_model(name)
    encoder = load_encoder(write_folder(model, tmp_path))
    family, config = encoder.family, encoder.config
    assert family.parse_config(family.format_config(config)) == config
    written = named_tensors(encoder.params, family.key_table(config))
    stored = {family.canonical_key(key): value for key, value in model.state_dict().items()}
    assert written.keys() == {key for key in stored if "position_ids" not in key}
    for key, tensor in written.items():
        np.testing.assert_array_equal(tensor, stored[key].numpy(), err_msg=key)
        assert tensor.flags.c_contiguous


@pytest.mark.parametrize("name", ["bert larger", "modernbert larger", "roberta", "qwen3"])
def test_pytorch_reads_the_written_configuration(name):
    """transformers makes the same model of what `format_config` writes."""
    config_class, fields = CASES[name][1:3]
    original = getattr(transformers, config_class)(**fields)
    family = next(f for f in FAMILIES if original.model_type in f.model_types)
    written = family.format_config(family.parse_config(original.to_dict()))
    again = getattr(transformers, config_class)(
        **{key: value for key, value in written.items() if key != "architectures"}
    )
    for field in ("hidden_size", "num_hidden_layers", "layer_types", "rope_parameters"):
        assert getattr(again, field, None) == getattr(original, field, None), field
    for field in ("max_position_embeddings", "layer_norm_eps", "hidden_act", "local_attention"):
        assert getattr(again, field, None) == getattr(original, field, None), field


FULL_SIZE = {
    "bert-base": ("BertModel", "BertConfig", {}),
    "bert-large": (
        "BertModel",
        "BertConfig",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    ),
    "xlm-roberta-large": (
        "XLMRobertaModel",
        "XLMRobertaConfig",
        {
            "vocab_size": 250002,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "pad_token_id": 1,
            "layer_norm_eps": 1e-5,
        },
    ),
    "modernbert-large": (
        "ModernBertModel",
        "ModernBertConfig",
        {
            "hidden_size": 1024,
            "intermediate_size": 2624,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
        },
    ),
    "qwen3-embedding-8b": (
        "Qwen3Model",
        "Qwen3Config",
        {
            "vocab_size": 151665,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_models_have_pytorchs_parameters(name):
    """Neither side allocates anything."""
    model_class, config_class, fields = FULL_SIZE[name]
    settings = getattr(transformers, config_class)(**fields)
    extra = {"add_pooling_layer": False} if "add_pooling_layer" in _arguments(model_class) else {}
    with torch.device("meta"):
        model = getattr(transformers, model_class)(settings, **extra)
    family = next(f for f in FAMILIES if settings.model_type in f.model_types)
    config = family.parse_config(settings.to_dict())
    _, shapes = family.abstract(config)
    found = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
    assert found == sum(parameter.numel() for parameter in model.parameters())
