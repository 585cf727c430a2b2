"""Training steps compiled for TPUs that are not there: what a chip has to hold.

Skipped without libtpu; `pip install --no-deps libtpu` brings the compiler, which needs no TPU.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import functools, sys
import jax, jax.numpy as jnp, optax
from jax.experimental import topologies
from ragjax.models.decoder.config import DecoderConfig
from ragjax.models.decoder.family import FAMILY
from ragjax.models.decoder.model import init_params
from ragjax.models.decoder.packing import PackedBatch
from ragjax.models.layers.stacks import cast_floats
from ragjax.training.lm import answer_tokens, make_lm_loss
from ragjax.training.mesh import _of_rows, make_layout
from ragjax.training.steps import init_state, make_train_step

topology, sizes, rows, length = sys.argv[1], eval(sys.argv[2]), *map(int, sys.argv[3:])
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
config, layout = DecoderConfig(**sizes), make_layout(devices, fsdp=len(devices))
optimizer = optax.adamw(1e-5)

def placed(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    where = layout.sharding(name, leaf.shape)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

def spread(*shape, dtype=jnp.int32):
    where = _of_rows(layout.mesh, jax.ShapeDtypeStruct(shape, dtype))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
state = jax.eval_shape(lambda params: init_state(params, optimizer, 0), params)
state = jax.tree_util.tree_map_with_path(placed, state)
slots, scored = spread(rows, length), spread(rows, 64)
batch = PackedBatch(slots, slots, slots, scored, scored, spread(rows, 64, dtype=bool))
score = functools.partial(FAMILY.packed_token_log_probs, config, remat=True)
loss = make_lm_loss(lambda params, batch: score(cast_floats(params, jnp.bfloat16), batch))
step = make_train_step(loss, optimizer, weight=answer_tokens)
memory = step.lower(state, batch, None).compile().memory_analysis()
held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
print((held + memory.temp_size_in_bytes) / 2**30)
"""

LLAMA_1B = {
    "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_layers": 16,
    "num_heads": 32, "num_kv_heads": 8, "head_dim": 64, "max_positions": 8192,
}  # fmt: skip
MISTRAL_7B = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_layers": 32,
    "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "max_positions": 8192,
    "tie_embeddings": False,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "sizes", "rows", "length"),
    [("v5e:2x4", LLAMA_1B, 32, 512), ("v5e:4x4", MISTRAL_7B, 16, 1024)],
)
def test_full_fine_tuning_fits_a_chip_of_16_gib(topology, sizes, rows, length):
    found = importlib.util.find_spec("libtpu")
    if found is None:
        pytest.skip("libtpu is not installed: nothing can be compiled for a TPU")
    library = Path(found.origin).parent / "libtpu.so"
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_LIBRARY_PATH": str(library),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "XLA_FLAGS": "",  # libtpu ends a process over a flag of the CPU's compiler
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, topology, repr(sizes), str(rows), str(length)],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 15
