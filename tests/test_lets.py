"""LeTs' expansion: the counts, every formula as a loop, gradients, which layers and which rows a descendant takes."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_lets import (
    NATIVE,
    SMALL,
    TOKEN,
    WIDE,
    Convnet,
    at,
    auxiliary,
    grow,
    images_of,
    made,
    noise,
    wrapped,
)
from torch import Tensor

from learngene_hub import factory
from learngene_hub.errors import ArtefactError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import _lesson
from learngene_hub.methods._lets_maps import MODULES, Groups, Growth, choose, tensor_shapes
from learngene_hub.methods.lets import Lets
from learngene_hub.shape import ViTShape

PUBLISHED_MAP = (0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)
PUBLISHED_ROWS = (0, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 14)


# What is stored ------------------------------------------------------------------------------------------------------


def published() -> tuple[ViTShape, ViTShape]:
    native = ViTShape(depth=16, width=768, heads=12, class_token=False, pool="avg")
    return native, replace(native, depth=8, width=384, heads=6)


def test_the_published_configuration_trains_37_735_784_parameters() -> None:
    shapes = tensor_shapes(*published())
    counts = dict.fromkeys(("learngene", "map", "depth", "positions"), 0)
    for name, shape in shapes.items():
        group = name.partition(".")[0]
        key = "positions" if name == "stem.pos_embed" else group if group in counts else "learngene"
        counts[key] += math.prod(shape)
    assert counts == {"learngene": 14_876_776, "map": 22_708_224, "depth": 256, "positions": 150_528}
    assert sum(counts.values()) == 37_735_784


def test_the_defaults_are_the_published_auxiliary_and_it_expands_to_every_parameter_of_timms() -> None:
    """On the meta device: nothing is allocated."""
    native, small = published()
    method = Lets()
    assert _lesson.auxiliary_shape(method, Convnet(), images_of(1, size=224), method.depth) == replace(
        native, classes=1
    )
    assert (method.learngene_depth, method.learngene_width) == (small.depth, small.width)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in tensor_shapes(native, small).items()}
    state = method.expand(wrapped(tensors, native, small), native)
    want = {name: tensor.shape for name, tensor in native.build(device="meta").state_dict().items()}
    assert {name: tensor.shape for name, tensor in state.items() if tensor is not None} == want


@pytest.mark.parametrize("layout", ["avg", "token"])
def test_check_takes_what_extraction_stores_and_nothing_else(layout: str) -> None:
    native, small = (replace(shape, **(TOKEN if layout == "token" else {})) for shape in (NATIVE, SMALL))
    shapes = tensor_shapes(native, small)
    Lets().check(shapes, native)
    for name, shape in shapes.items():
        for wrong in ({k: v for k, v in shapes.items() if k != name}, shapes | {name: (*shape, 2)}):
            with pytest.raises(ArtefactError):
                Lets().check(wrong, native)
    for other in (at(native, width=2), replace(native, depth=7), replace(native, classes=0)):
        with pytest.raises(ArtefactError):
            Lets().check(shapes, other)
    same = tensor_shapes(native, replace(native, depth=4))
    assert not any(name.startswith("map.") for name in same)
    Lets().check(same, native)


# The formulas, as loops ----------------------------------------------------------------------------------------------


def extended(rows: Tensor) -> Tensor:
    """E(F) = [I ; F], entry by entry."""
    extra, units = rows.shape
    whole = torch.zeros(units + extra, units, dtype=rows.dtype)
    for i in range(units):
        whole[i, i] = 1.0
    for i, j in itertools.product(range(extra), range(units)):
        whole[units + i, j] = rows[i, j]
    return whole


def both_sides(made_by: Tensor, w: Tensor, read_by: Tensor) -> Tensor:
    """E w E'^T as sums over the learngene's units."""
    made, old, read = made_by.tolist(), w.tolist(), read_by.tolist()
    units, inputs = range(w.shape[0]), range(w.shape[1])
    entries = [[sum(m[a] * old[a][b] * r[b] for a in units for b in inputs) for r in read] for m in made]
    return torch.tensor(entries, dtype=w.dtype)


def naive(tensors: dict[str, Tensor], places: list[tuple[int, int]]) -> dict[str, Tensor]:
    """The auxiliary at full width, its layers as (group, row of coefficients), from the formulas of the paper."""
    e = {name[4:]: extended(rows) for name, rows in tensors.items() if name.startswith("map.")}
    stream = e["stream"]
    state = {
        "pos_embed": tensors["stem.pos_embed"],
        "patch_embed.proj.bias": stream @ tensors["stem.patch_embed.proj.bias"],
        "patch_embed.proj.weight": torch.einsum("oa,acpq->ocpq", stream, tensors["stem.patch_embed.proj.weight"]),
        "fc_norm.weight": stream @ tensors["tail.norm.weight"],
        "fc_norm.bias": stream @ tensors["tail.norm.bias"],
        "head.weight": tensors["head.weight"] @ e["head"].T,
        "head.bias": tensors["head.bias"],
    }
    layers = []
    for j in range(4):
        t = {name[8:]: tensor for name, tensor in tensors.items() if name.startswith(f"block.{j}.")}
        part = {n: (stream @ t[f"{n}.weight"], stream @ t[f"{n}.bias"]) for n in ("norm1", "norm2")}
        for place, name in enumerate("qkv"):
            rows = slice(4 * place, 4 * place + 4)
            made_by = e[f"{name}.{j}"]
            w, b = t["attn.qkv.weight"][rows], t["attn.qkv.bias"][rows]
            part[name] = (both_sides(made_by, w, stream), made_by @ b)
        hidden = e[f"hidden.{j}"]
        part["proj"] = (both_sides(stream, t["attn.proj.weight"], e[f"v.{j}"]), stream @ t["attn.proj.bias"])
        part["fc1"] = (both_sides(hidden, t["mlp.fc1.weight"], stream), hidden @ t["mlp.fc1.bias"])
        part["fc2"] = (both_sides(stream, t["mlp.fc2.weight"], hidden), stream @ t["mlp.fc2.bias"])
        layers.append(part)
    for i, (group, row) in enumerate(places):
        mixed = {}
        for m, name in enumerate(MODULES):
            for kind, key in enumerate(("weight", "bias")):
                g = tensors[f"depth.{key}"]
                mixed[name, key] = sum(g[row, m, s] * layers[2 * group + s][name][kind] for s in (0, 1))
        for key in ("weight", "bias"):
            state[f"blocks.{i}.attn.qkv.{key}"] = torch.cat([mixed["q", key], mixed["k", key], mixed["v", key]])
            names = {"norm1": "norm1", "norm2": "norm2", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
            state |= {f"blocks.{i}.{long}.{key}": mixed[short, key] for short, long in names.items()}
    return state


def test_expand_is_the_papers_formulas() -> None:
    learngene = made(dtype=torch.float64)
    want = naive(dict(learngene.tensors), [(0, 0), (0, 0), (0, 1), (0, 1), (1, 2), (1, 2), (1, 3), (1, 3)])
    state = grow(learngene, NATIVE)
    assert state.keys() == want.keys() == NATIVE.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-12, atol=1e-12, msg=name)


def test_groups_that_use_different_rows_are_the_papers_formulas_too() -> None:
    """One row of the first group, its second; both of the second group, in the other order."""
    learngene = made(dtype=torch.float64)
    state = grow(learngene, at(NATIVE, depth=3), layer_map=(1, 6, 4), coefficients=(2, 6, 4))
    for name, tensor in naive(dict(learngene.tensors), [(0, 1), (1, 3), (1, 2)]).items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-12, atol=1e-12, msg=name)


def test_numbers_do_not_depend_on_autocast() -> None:
    learngene = made()
    with torch.autocast("cpu", torch.bfloat16):
        state = grow(learngene, NATIVE)
    assert all(torch.equal(tensor, state[name]) for name, tensor in grow(learngene, NATIVE).items())


def test_a_grown_block_has_memory_of_its_own_and_no_more_of_it() -> None:
    state = grow(made(), NATIVE)
    for i in range(0, 8, 2):  # layers i and i + 1 share their tensors
        for name, tensor in state.items():
            if name.startswith(f"blocks.{i}."):
                assert tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous(), name
                assert tensor is state[name.replace(f"blocks.{i}.", f"blocks.{i + 1}.")]
    starts = {tensor.data_ptr() for name, tensor in state.items() if name.startswith("blocks.")}
    assert len(starts) == 4 * 12


def test_layers_2k_and_2k_plus_1_are_identical_and_no_others() -> None:
    state = grow(made(), NATIVE)
    layers = [state[f"blocks.{i}.mlp.fc1.weight"] for i in range(8)]
    for i, j in itertools.combinations(range(8), 2):
        assert torch.equal(layers[i], layers[j]) == (i // 2 == j // 2), (i, j)


@pytest.mark.parametrize("select", ["continuous", "step", "random", "magnitude"])
@pytest.mark.parametrize("layout", [{}, TOKEN])
def test_growing_the_auxiliarys_own_shape_is_the_auxiliary_bit_for_bit(select: str, layout: dict[str, Any]) -> None:
    learngene = made(replace(NATIVE, **layout), replace(SMALL, **layout), select=select)
    trained = auxiliary(learngene)
    grown: Any = factory.expand(learngene)
    state = trained.state()
    assert all(torch.equal(tensor, state[name]) for name, tensor in grown.state_dict().items())
    x = noise(2, 3, 4, 4)
    with torch.no_grad():
        grown.blocks.apply(lambda module: setattr(module, "fused_attn", False))
        assert torch.equal(grown(x), trained(x))


def sub_block(state: dict[str, Tensor], small: int, stream: Tensor, inner: Tensor, hidden: Tensor) -> dict[str, Tensor]:
    """The parts of an auxiliary's tensors at these rows, beside the learngene's own units."""
    units = torch.cat([torch.arange(small), small + stream])
    heads = torch.cat([torch.arange(small), small + inner])
    mlp = torch.cat([torch.arange(2 * small), 2 * small + hidden])
    qkv = torch.cat([heads + third * state["pos_embed"].shape[-1] for third in range(3)])
    out = {}
    for name, tensor in state.items():
        rows = {"qkv": qkv, "fc1": mlp}.get(name.split(".")[-2], units) if "." in name else None
        columns = {"proj": heads, "fc2": mlp}.get(name.split(".")[-2], units) if "blocks" in name else None
        if name == "pos_embed":
            out[name] = tensor[..., units]
        elif name.startswith("head."):
            out[name] = tensor[:, units] if tensor.ndim == 2 else tensor
        else:
            assert rows is not None
            out[name] = tensor[rows] if tensor.ndim != 2 or columns is None else tensor[rows][:, columns]
    return out


@pytest.mark.parametrize("width", [4, 6])
def test_a_narrower_descendant_is_the_leading_part_of_the_auxiliary(width: int) -> None:
    learngene = made()
    extra = torch.arange(width - 4)
    want = sub_block(grow(learngene, NATIVE), 4, extra, extra, torch.arange(2 * (width - 4)))
    for name, tensor in grow(learngene, at(NATIVE, width=width)).items():
        torch.testing.assert_close(tensor, want[name], msg=name)


def test_the_learngenes_own_width_uses_no_row() -> None:
    learngene = made()
    without = replace(learngene, tensors={k: v for k, v in learngene.tensors.items() if not k.startswith("map.")})
    narrow = at(NATIVE, width=4)
    state, alone = grow(learngene, narrow), grow(without, narrow)
    assert all(torch.equal(tensor, alone[name]) for name, tensor in state.items())
    assert torch.equal(state["fc_norm.weight"], learngene.tensors["tail.norm.weight"])


@pytest.mark.parametrize("scheme", ["rand", "preserving"])
def test_gradients_of_expand_are_those_of_finite_differences(scheme: str) -> None:
    native = at(NATIVE, depth=2, width=4, mlp_ratio=1.0, image_size=2, classes=2)
    small = at(native, width=2)
    learngene = made(native, small, dtype=torch.float64, scheme=scheme)
    names = sorted(learngene.tensors)

    def total(*values: Tensor) -> Tensor:
        state = grow(replace(learngene, tensors=dict(zip(names, values, strict=True))), native)
        return torch.stack([(tensor.flatten() ** 2).sum() for tensor in state.values()])

    values = [learngene.tensors[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(total, values, fast_mode=True)


def test_stored_halves_are_multiplied_in_float32() -> None:
    learngene = made()
    halves = learngene.to(torch.float16)
    want = grow(halves.to(torch.float32), NATIVE)
    for name, tensor in grow(halves, NATIVE).items():
        assert torch.equal(tensor.float(), want[name]), name


def test_a_head_is_inherited_where_there_are_as_many_classes() -> None:
    learngene = made()
    assert {"head.weight", "head.bias"} <= grow(learngene, NATIVE).keys()
    for state in (grow(learngene, NATIVE, head="fresh"), grow(learngene, replace(NATIVE, classes=4))):
        assert not {"head.weight", "head.bias"} & state.keys()
    assert grow(learngene, replace(NATIVE, classes=0)).keys() == replace(NATIVE, classes=0).keys()


# Which layers --------------------------------------------------------------------------------------------------------


def test_the_published_lists_are_the_rule_at_depth_12_and_are_accepted() -> None:
    groups = Groups.of(16, 8)
    want = tuple(zip([0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3], [0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7], strict=True))
    assert groups.places(12) == want == groups.listed(PUBLISHED_MAP, PUBLISHED_ROWS)
    native, small = published()
    listed = Lets(layer_map=PUBLISHED_MAP, coefficients=PUBLISHED_ROWS)
    assert listed.layers(native, small, 12) == want and listed.layers(native, small, 16) == groups.places(16)


@pytest.mark.parametrize(
    ("depth", "per_group"),
    [(4, [1, 1, 1, 1]), (5, [1, 2, 1, 1]), (6, [1, 2, 2, 1]), (10, [1, 4, 4, 1]), (11, [2, 4, 4, 1]), (16, [4] * 4)],
)
def test_the_rule_at_other_depths(depth: int, per_group: list[int]) -> None:
    """Middle groups first; inside a group a, ab, aab, aabb."""
    inside = {1: [0], 2: [0, 1], 3: [0, 0, 1], 4: [0, 0, 1, 1]}
    want = [(g, 2 * g + row) for g, count in enumerate(per_group) for row in inside[count]]
    assert list(Groups.of(16, 8).places(depth)) == want


@pytest.mark.parametrize(("depth", "small"), [(4, 2), (4, 4), (6, 4), (9, 6), (10, 2), (2, 4), (24, 8)])
def test_every_depth_within_reach_has_that_many_layers_in_order(depth: int, small: int) -> None:
    groups = Groups.of(depth, small)
    assert [groups.first_layer(row) for row in range(groups.rows)] == [
        g * groups.size + k for g in range(groups.count) for k in range(0, groups.size, 2)
    ]
    for asked in range(groups.count, depth + 1):
        places = groups.places(asked)
        assert len(places) == asked and list(places) == sorted(places)
        assert {group for group, _ in places} == set(range(groups.count))
        assert all(row // groups.per_group == group for group, row in places)


def test_lists_of_ones_own_pick_pairs_and_rows() -> None:
    learngene = made(dtype=torch.float64)
    state = grow(learngene, at(NATIVE, depth=3), layer_map=[1, 7, 4], coefficients=[2, 4, 6])
    want = naive(dict(learngene.tensors), [(0, 1), (1, 2), (1, 3)])
    assert state.keys() == want.keys()
    assert all(torch.allclose(tensor, want[name], rtol=1e-12) for name, tensor in state.items())


# Which rows ----------------------------------------------------------------------------------------------------------


def ranked(learngene: Learngene, name: str, order: list[int], size: int = 1) -> None:
    """Make the rows of a map, in blocks of ``size``, the larger the earlier they stand in ``order``."""
    rows = learngene.tensors[f"map.{name}"]
    for rank, block in enumerate(order):
        rows[block * size : (block + 1) * size] = torch.sign(rows[block * size : (block + 1) * size]) * 2.0**-rank


@pytest.mark.parametrize(
    ("settings", "stream", "heads", "hidden"),
    [
        ({"select": "continuous"}, [0, 1, 2, 3], [0, 1], list(range(8))),
        ({"select": "step"}, [0, 2, 4, 6], [0, 2], [0, 2, 4, 6, 8, 10, 12, 14]),
        ({"select": "step", "stride": 3, "first": 1}, [1, 2, 4, 7], [0, 1], [0, 1, 2, 4, 7, 10, 13, 5]),
        ({"select": "magnitude"}, [1, 3, 5, 7], [2, 3], [8, 9, 10, 11, 12, 13, 14, 15]),
        ({"select": "magnitude", "norm": "l2"}, [1, 3, 5, 7], [2, 3], [8, 9, 10, 11, 12, 13, 14, 15]),
        ({"select": "magnitude", "keep": "bottom"}, [0, 2, 4, 6], [0, 1], list(range(8))),
    ],
)
def test_selection_takes_one_set_per_tied_axis(
    settings: dict[str, Any], stream: list[int], heads: list[int], hidden: list[int]
) -> None:
    """A descendant of 8 channels is the auxiliary of 12 at these rows, everywhere where an axis occurs.

    "step" by 3 from 1 over 4 heads: 1, then 4 mod 4 = 0; over 16: 1, 4, 7, 10, 13, 0, then 2, 5.
    """
    learngene = made(WIDE)
    ranked(learngene, "stream", [7, 5, 3, 1, 0, 2, 4, 6])
    for layer in range(4):
        ranked(learngene, f"hidden.{layer}", [*range(8, 16), *range(8)])
        for part in "qkv":
            ranked(learngene, f"{part}.{layer}", [3, 2, 1, 0], size=2)
    inner = [2 * head + unit for head in heads for unit in (0, 1)]
    full, narrow = grow(learngene, WIDE), grow(learngene, at(WIDE, width=8), **settings)
    want = sub_block(full, 4, *(torch.tensor(sorted(rows)) for rows in (stream, inner, hidden)))
    for name, tensor in narrow.items():
        torch.testing.assert_close(tensor, want[name], msg=name)


@pytest.mark.parametrize(("norm", "row"), [("l1", 1), ("l2", 0)])
def test_the_two_norms_can_disagree(norm: str, row: int) -> None:
    """(3, 0, 0, 0) has norms 3 and 3, (0.9, 0.9, 0.9, 0.9) has 3.6 and 1.8."""
    rows = torch.tensor([[3.0, 0, 0, 0], [0.9] * 4])
    growth = Growth(Lets(select="magnitude", norm=norm), {"stream": rows}, NATIVE, SMALL, NATIVE)
    assert int(growth._norms(["stream"]).argmax()) == row
    assert choose(growth.method, "stream", 2, 1, lambda: growth._norms(["stream"])).tolist() == [row]


def test_magnitude_sums_over_the_two_layers_of_a_group_and_ranks_groups_apart() -> None:
    """Layer 0 prefers heads 0, 1 by little, layer 1 heads 2, 3 by much; the second group prefers heads 0, 3.

    Hidden units in quarters as heads: the same.
    """
    learngene = made(WIDE)
    for layer, sizes in enumerate(([2.0, 2.0, 1.0, 1.0], [1.0, 1.0, 9.0, 9.0], [5.0, 1.0, 1.0, 5.0], [1.0] * 4)):
        for name, times in (*((part, 2) for part in "qkv"), ("hidden", 4)):
            rows = torch.tensor(sizes).repeat_interleave(times)[:, None]
            learngene.tensors[f"map.{name}.{layer}"].copy_(rows)
    growth = Growth(Lets(select="magnitude"), learngene.group("map"), WIDE, SMALL, at(WIDE, width=8))
    for group, quarters in enumerate(([2, 3], [0, 3])):
        assert growth.head_rows(group).tolist() == [2 * quarter + unit for quarter in quarters for unit in range(2)]
        assert growth.hidden_rows(group).tolist() == [4 * quarter + unit for quarter in quarters for unit in range(4)]


def test_random_rows_depend_on_their_seed_alone() -> None:
    learngene = made(WIDE)
    shape = at(WIDE, width=8)
    first, again, other = (grow(learngene, shape, select="random", select_seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(5)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first["pos_embed"], other["pos_embed"])


# Refusals ------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"depth": 1}, "depth 1 asked.*depth 2 would work"),
        ({"depth": 9}, "depth 9 asked.*depth 8 would work"),
        ({"width": 2}, "width 2 asked.*width 4 would work"),
        ({"width": 10}, "width 10 asked.*width 8 would work"),
    ],
)
def test_growth_beyond_the_auxiliary_is_refused(change: dict[str, int], line: str) -> None:
    with pytest.raises(ShapeError, match=line):
        Lets().expand(made(), at(NATIVE, **change))


def test_lists_that_name_no_layer_or_row_are_refused() -> None:
    for layers, rows, line in (
        ([8, 0], [0, 0], "layer_map with 8"),
        ([0, 0], [0, 3], "coefficients with 3.*0, 2, 4, 6"),
    ):
        with pytest.raises(ShapeError, match=line):
            grow(made(), at(NATIVE, depth=2), layer_map=layers, coefficients=rows)
