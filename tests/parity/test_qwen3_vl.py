"""Qwen3-VL against transformers, with random weights: names, numbers, padding, compilation."""

import dataclasses
import json
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamlite_jax.data.qwen_inputs import qwen_inputs, rope_positions
from dreamlite_jax.models.qwen3_vl.config import QWEN3_VL_2B, TINY, Qwen3VLConfig
from dreamlite_jax.models.qwen3_vl.model import VISION_INPUTS, Qwen3VL, blank_inputs
from dreamlite_jax.models.qwen3_vl.vision import VisionModel
from dreamlite_jax.pretrained import TEXT_ENCODER, param_shapes, tensor_table

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

BUCKETS = {"text_buckets": (48, 64), "patch_buckets": (32, 64)}

# What varies: grouping of heads, head widths, M-RoPE sections, DeepStack, the table's side, merge
# and patch sizes, biases, tied or untied embeddings.
VARIANTS = {
    "tiny": TINY,
    "mha": Qwen3VLConfig(
        text=dataclasses.replace(
            TINY.text, num_key_value_heads=4, head_dim=24, mrope_section=(4, 4, 4), rope_theta=1e4
        ),
        vision=dataclasses.replace(
            TINY.vision, num_heads=4, deepstack_visual_indexes=(2,), num_position_embeddings=25
        ),
        image_token_id=259,
    ),
    "one_kv_head": Qwen3VLConfig(
        text=dataclasses.replace(
            TINY.text, num_key_value_heads=1, head_dim=10, attention_bias=True, rms_norm_eps=1e-5
        ),
        vision=dataclasses.replace(
            TINY.vision,
            patch_size=6,
            temporal_patch_size=1,
            spatial_merge_size=1,
            deepstack_visual_indexes=(1, 0, 2),
            num_position_embeddings=4,
            rope_theta=100.0,
        ),
        image_token_id=259,
        tie_word_embeddings=True,
    ),
}


def torch_model(config, seed=0):
    """transformers' model with every parameter random: ones and zeros would hide mistakes."""
    reference = transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig.from_dict(config.to_dict())
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if re.search(r"norm\d?\.weight$", name):
                p.copy_(1 + 0.3 * noise)
            elif p.ndim == 1:
                p.copy_(0.3 * noise)
            else:
                p.copy_(noise * (1.0 if "embed" in name and p.ndim == 2 else p[0].numel() ** -0.5))
    return reference


def load(config, tensors):
    """The tree of parameters from transformers' tensors, each of which must be used."""
    table = tensor_table(param_shapes(TEXT_ENCODER, config))
    assert {row.name: row.shape for row in table} == {k: v.shape for k, v in tensors.items()}
    flat = {row.path: jnp.asarray(row.to_parameter(tensors[row.name])) for row in table}
    return flax.traverse_util.unflatten_dict(flat)


def file_tensors(reference, tmp_path):
    """What save_pretrained puts on disk (tied tensors once)."""
    from safetensors.numpy import load_file

    reference.save_pretrained(tmp_path)
    return load_file(tmp_path / "model.safetensors")


def state(config, reference):
    tensors = {k: v.numpy() for k, v in reference.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def encode(config, grids, lengths, side="right", seed=0):
    """A processor's output: prompts of `lengths` words, each around an image of a grid or None."""
    rng = np.random.default_rng(seed)
    merge, rows, pixels = config.vision.spatial_merge_size, [], []
    for grid, length in zip(grids, lengths, strict=True):
        row = rng.integers(1, 250, length).tolist()
        if grid is not None:
            tokens = [257, *[config.image_token_id] * (grid[0] * grid[1] // merge**2), 258]
            row[3:3] = tokens
            pixels.append(rng.standard_normal((grid[0] * grid[1], config.vision.patch_dim)))
        rows.append(row)
    longest = max(map(len, rows))
    ids, mask = np.full((len(rows), longest), 256), np.zeros((len(rows), longest), np.int64)
    for b, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[b, place], mask[b, place] = row, 1
    out = {"input_ids": ids, "attention_mask": mask}
    if pixels:
        out["pixel_values"] = np.concatenate(pixels).astype(np.float32)
        out["image_grid_thw"] = np.array([(1, *g) for g in grids if g is not None])
        out["mm_token_type_ids"] = (ids == config.image_token_id).astype(np.int64)
    return out


def reference_rows(reference, encoded):
    """hidden_states[-1], and the same through the pipeline's eyes: the valid tokens of each row."""
    with torch.no_grad():
        out = reference(
            **{k: torch.tensor(v) for k, v in encoded.items()}, output_hidden_states=True
        )
    hidden, mask = out.hidden_states[-1].numpy(), encoded["attention_mask"].astype(bool)
    return [row[valid] for row, valid in zip(hidden, mask, strict=True)]


def our_rows(apply, params, config, encoded, **buckets):
    inputs = qwen_inputs(encoded, **config.input_numbers, **(buckets or BUCKETS))
    hidden = np.asarray(apply(params, inputs))
    assert np.isfinite(hidden).all()
    return [row[valid] for row, valid in zip(hidden, inputs["attention_mask"], strict=True)]


def worst(ours, theirs):
    """Largest deviation relative to the largest value of the row."""
    pairs = list(zip(ours, theirs, strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request):
    config = VARIANTS[request.param]
    reference = torch_model(config)
    params = load(config, state(config, reference))
    apply = jax.jit(lambda p, inputs: Qwen3VL(config).apply({"params": p}, inputs))
    return config, reference, params, apply


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_agrees(pair, side):
    config, reference, params, apply = pair
    encoded = encode(config, [None] * 3, [7, 30, 18], side)
    error = worst(our_rows(apply, params, config, encoded), reference_rows(reference, encoded))
    assert error < 2e-5, error


@pytest.mark.parametrize("side", ["left", "right"])
def test_images_of_several_shapes_and_none_agree(pair, side):
    """One compilation covers both sides and every mixture of aspect ratios."""
    config, reference, params, apply = pair
    unit = 1 if config.vision.spatial_merge_size == 1 else 2
    grids = [(2 * unit, 5 * unit), None, (3 * unit, 3 * unit), (5 * unit, unit)]
    encoded = encode(config, grids, [9, 14, 5, 20], side, seed=1)
    error = worst(our_rows(apply, params, config, encoded), reference_rows(reference, encoded))
    assert error < 2e-5, error


def test_vision_tower_agrees(pair):
    """Tokens and DeepStack features, before the text tower can wash a mistake out."""
    config, reference, params, _ = pair
    encoded = encode(config, [(4, 6), (6, 2)], [5, 6], seed=2)
    inputs = qwen_inputs(encoded, **config.input_numbers, **BUCKETS)
    with torch.no_grad():
        out = reference.model.visual(
            torch.tensor(encoded["pixel_values"]), torch.tensor(encoded["image_grid_thw"])
        )
    tower = VisionModel(config.vision)
    tokens, features = jax.jit(tower.apply)(
        {"params": params["model"]["visual"]}, *(inputs[name] for name in VISION_INPUTS)
    )
    counts = [24 // config.vision.merge_area, 12 // config.vision.merge_area]
    theirs = [out.pooler_output, *out.deepstack_features]
    assert len(features) == len(out.deepstack_features)
    for a, b in zip([tokens, *features], theirs, strict=True):
        ours = np.concatenate([np.asarray(a[0, : counts[0]]), np.asarray(a[1, : counts[1]])])
        assert worst([ours], [b.numpy()]) < 2e-5


def test_positions_are_transformers_own(pair):
    config, reference, _, _ = pair
    encoded = encode(config, [(4, 6), (2, 2), None, (2, 8)], [9, 3, 12, 6], "left", seed=3)
    expected, _ = reference.model.get_rope_index(
        **{
            k: torch.tensor(encoded[k])
            for k in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        }
    )
    grids = iter(encoded["image_grid_thw"].tolist())
    numbers = {k: config.input_numbers[k] for k in ("image_token_id", "spatial_merge_size")}
    for b, (ids, mask) in enumerate(
        zip(encoded["input_ids"], encoded["attention_mask"].astype(bool), strict=True)
    ):
        grid = next(grids) if (ids == config.image_token_id).any() else None
        ours = rope_positions(ids[mask], grid, **numbers)
        np.testing.assert_array_equal(ours, expected[:, b].numpy()[:, mask])


def test_last_hidden_state_is_after_the_final_norm(pair):
    """What our docstring says of hidden_states[-1] in this version of transformers."""
    _, reference, _, _ = pair
    with torch.no_grad():
        out = reference(input_ids=torch.arange(1, 9)[None], output_hidden_states=True)
        logits = reference.lm_head(out.hidden_states[-1])
    torch.testing.assert_close(logits, out.logits)


def test_larger_buckets_change_nothing(pair):
    """Padding reaches no valid token: only the order of float32 sums may differ."""
    config, _, params, apply = pair
    encoded = encode(config, [(4, 4), None], [9, 14], seed=4)
    small = our_rows(apply, params, config, encoded, text_buckets=(32,), patch_buckets=(16,))
    large = our_rows(apply, params, config, encoded, text_buckets=(96,), patch_buckets=(128,))
    assert worst(large, small) < 5e-6


def test_padding_holds_no_information(pair):
    """Whatever lies in padded patches and tokens, valid places come out bit-equal."""
    config, _, params, apply = pair
    encoded = encode(config, [(4, 4), (2, 4)], [9, 14], seed=5)
    clean = qwen_inputs(encoded, **config.input_numbers, **BUCKETS)
    dirty, rng = {k: v.copy() for k, v in clean.items()}, np.random.default_rng(0)
    nowhere, unread = ~clean["patch_mask"], ~clean["attention_mask"]
    dirty["pixel_values"][nowhere] = 100 * rng.standard_normal(dirty["pixel_values"][nowhere].shape)
    dirty["patch_positions"][nowhere] = 7
    dirty["interp_indices"][nowhere] = 3
    dirty["interp_weights"][nowhere] = 5
    dirty["input_ids"][unread] = 11
    a, b = apply(params, clean), apply(params, dirty)
    valid = clean["attention_mask"]
    np.testing.assert_array_equal(np.asarray(a)[valid], np.asarray(b)[valid])


def test_one_compilation_for_all_prompts_of_a_bucket():
    apply = jax.jit(lambda p, inputs: Qwen3VL(TINY).apply({"params": p}, inputs))
    params = jax.jit(Qwen3VL(TINY).init)(jax.random.key(0), blank_inputs(TINY))["params"]
    for seed, grids in enumerate([[(4, 4), None], [(2, 6), (6, 2)], [None, (2, 2)]]):
        our_rows(apply, params, TINY, encode(TINY, grids, [5 + seed, 9], seed=seed))
    assert apply._cache_size() == 1
    for seed in range(3):
        our_rows(apply, params, TINY, encode(TINY, [None] * 2, [5 + seed, 9], seed=seed))
    assert apply._cache_size() == 2


def test_text_only_leaves_the_vision_tower_out():
    """init makes its parameters all the same; the network runs without them."""
    model, inputs = Qwen3VL(TINY), blank_inputs(TINY)
    towers = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]["model"]
    assert set(towers) == {"language_model", "visual"}
    text_alone = {"params": {"model": {"language_model": towers["language_model"]}}}
    hidden = jax.eval_shape(model.apply, text_alone, inputs)
    assert hidden.shape == (1, 1, TINY.text.hidden_size)


def test_bfloat16_stays_near_float32():
    config, reference = TINY, torch_model(TINY)
    params = load(config, state(config, reference))
    encoded = encode(config, [(4, 4), None], [9, 14], seed=6)
    apply = jax.jit(lambda p, x: Qwen3VL(config, jnp.bfloat16).apply({"params": p}, x))
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    inputs = qwen_inputs(encoded, **config.input_numbers, **BUCKETS)
    hidden = apply(half, inputs)
    assert hidden.dtype == jnp.bfloat16
    valid = inputs["attention_mask"]
    theirs = np.concatenate(reference_rows(reference, encoded))
    ours = np.asarray(hidden, np.float32)[valid]
    assert np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)) < 0.05


def test_gradients_reach_every_parameter():
    """A stage may train a tiny encoder: all weights get finite gradients, none of them all zero."""
    encoded = encode(TINY, [(4, 4), None], [9, 14], seed=7)
    inputs = qwen_inputs(encoded, **TINY.input_numbers, **BUCKETS)
    params = jax.jit(Qwen3VL(TINY).init)(jax.random.key(1), inputs)["params"]
    weights = np.random.default_rng(0).standard_normal((2, 48, TINY.text.hidden_size))
    weights *= inputs["attention_mask"][..., None]

    @jax.jit
    def gradients(p):
        return jax.grad(lambda p: jnp.sum(Qwen3VL(TINY).apply({"params": p}, inputs) * weights))(p)

    for path, g in flax.traverse_util.flatten_dict(gradients(params)).items():
        assert np.isfinite(g).all(), path
        assert np.abs(g).max() > 0, path


def test_names_are_those_on_disk(tmp_path):
    """save_pretrained's file, tied and untied, is used up by the rule of names."""
    for name in ("tiny", "mha"):
        config = VARIANTS[name]
        load(config, file_tensors(torch_model(config), tmp_path / name))


def test_real_model_has_the_names_and_shapes_of_transformers():
    config = QWEN3_VL_2B
    with torch.device("meta"):
        reference = transformers.Qwen3VLForConditionalGeneration(
            transformers.Qwen3VLConfig.from_dict(config.to_dict())
        )
    theirs = {k: tuple(v.shape) for k, v in reference.state_dict().items()}
    del theirs["lm_head.weight"]  # tied
    tree = param_shapes(TEXT_ENCODER, config)
    ours = {row.name: row.shape for row in tensor_table(tree)}
    assert ours == theirs
    assert len(ours) == 625  # as counted in the released file
    assert sum(p.size for p in jax.tree.leaves(tree)) == 2_127_532_032


def test_layers_of_the_real_width_agree():
    """One text layer, one vision block and both mergers as wide as Qwen3-VL-2B's."""
    config = dataclasses.replace(
        QWEN3_VL_2B,
        text=dataclasses.replace(QWEN3_VL_2B.text, num_hidden_layers=1, vocab_size=300),
        vision=dataclasses.replace(QWEN3_VL_2B.vision, depth=1, deepstack_visual_indexes=(0,)),
        image_token_id=259,
    )
    reference = torch_model(config)
    params = load(config, state(config, reference))
    encoded = encode(config, [(4, 6), None], [9, 14], seed=8)
    apply = jax.jit(lambda p, x: Qwen3VL(config).apply({"params": p}, x))
    ours = our_rows(apply, params, config, encoded, text_buckets=(24,), patch_buckets=(32,))
    error = worst(ours, reference_rows(reference, encoded))
    assert error < 2e-5, error


@pytest.mark.parametrize("name", VARIANTS)
def test_config_round_trips_through_transformers(name):
    """Our dict and the one transformers writes from it (its newer form) give the same config."""
    config = VARIANTS[name]
    assert Qwen3VLConfig.from_dict(config.to_dict()) == config
    written = transformers.Qwen3VLConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert Qwen3VLConfig.from_dict(json.loads(written.to_json_string())) == config
    assert "rope_parameters" in written.to_dict()["text_config"]
    hash(config)


def test_absent_settings_take_the_defaults_of_transformers():
    sized = {"vision_config": {"out_hidden_size": 4096}}  # their defaults do not fit each other
    theirs = transformers.Qwen3VLConfig.from_dict(sized).to_dict()
    assert Qwen3VLConfig.from_dict(theirs) == Qwen3VLConfig.from_dict(sized)
