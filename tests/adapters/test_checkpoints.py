"""Fishers and merged models as checkpoints, which never are in memory as a whole."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2v_fast.adapters import checkpoints
from t2v_fast.adapters.checkpoints import Checkpoint, keys_of, save_sharded
from t2v_fast.adapters.language import next_tokens
from t2v_fast.adapters.merging import fisher_merge, merge_checkpoints, merge_unscaled
from t2v_fast.cli import main
from t2v_fast.estimation.estimator import fisher

SHAPES = {"a.weight": (5, 3, 2), "a.bias": (5,), "b.weight": (4, 5), "scale": (), "empty": (0, 3)}


def model(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return made | {"steps": torch.tensor([seed, 7]), "mask": torch.tensor([True, False])}


def importance(seed: int, missing: str = "a.bias") -> dict[str, Tensor]:
    return {k: v.square() * 10**seed for k, v in model(seed + 9).items() if k not in (missing, "steps", "mask")}


def everything(folder: Path) -> dict[str, Tensor]:
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.entries}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_bytes", [1, 100, 10**6])
def test_shards_hold_what_was_saved(dtype: torch.dtype, shard_bytes: int, tmp_path: Path) -> None:
    want = model(1, dtype)
    files = save_sharded(want, tmp_path, shard_bytes)
    assert (len(files) == 1) == (shard_bytes == 10**6) == (files[0].name == "model.safetensors")
    assert_equal(everything(tmp_path), want)
    assert_equal({k: v for f in files for k, v in load_file(f).items()}, want)  # the package reads the same
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            tensors = [opened.get_tensor(k) for k in opened.keys()]  # noqa: SIM118
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors) <= shard_bytes
    if len(files) > 1:
        index = json.loads((tmp_path / checkpoints.INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in want.values())
        assert index["weight_map"].keys() == want.keys()
    with pytest.raises(FileExistsError, match="give another folder"):
        save_sharded(want, tmp_path)


@pytest.mark.parametrize("piece", [1, 7, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_checkpoints_is_merging(
    piece: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "PIECE", piece)
    models, fishers = [model(s, dtype) for s in (1, 2, 3)], [importance(s) for s in (1, 2, 3)]
    for k, (m, f) in enumerate(zip(models, fishers, strict=True)):
        save_sharded(m, tmp_path / f"m{k}", [60, 10**6, 1][k])  # each in another number of files
        save_sharded(f, tmp_path / f"f{k}", [10**6, 60, 1][k])
    (tmp_path / "m0" / "config.json").write_text("{}")
    paths = [[tmp_path / f"{letter}{k}" for k in range(3)] for letter in "mf"]
    merge_checkpoints(*paths, tmp_path / "merged", [1, 2, 3])
    want = fisher_merge(models, fishers, [1, 2, 3])
    # A tensor without Fishers has the models' weights here, and so has fisher_merge.
    assert_equal(everything(tmp_path / "merged"), want)
    names = {p.name for p in (tmp_path / "m0").iterdir()}
    assert {p.name for p in (tmp_path / "merged").iterdir()} == names  # files, index and configuration
    floating = [{k: v for k, v in m.items() if v.is_floating_point() and k != "a.bias"} for m in models[:2]]
    for k, m in enumerate(floating):
        save_file(m, tmp_path / f"{k}.safetensors")
    merge_checkpoints(
        [tmp_path / f"{k}.safetensors" for k in range(2)],
        paths[1][:2],
        tmp_path / "mats",
        [0.3, 0.7],
        normalize=False,
        floor=0,
        minimum=1e-8,
    )
    assert_equal(load_file(tmp_path / "mats" / "0.safetensors"), merge_unscaled(floating, fishers[:2], [0.3, 0.7]))


def test_a_fisher_by_filter_counts_for_all_entries(tmp_path: Path) -> None:
    models = [model(s) for s in (1, 2)]
    by_filter = [{"a.weight": torch.arange(5.0) + s, "a.bias": torch.ones(5)} for s in (1, 2)]
    full = [{k: v.view(-1, *[1] * (len(SHAPES[k]) - 1)).expand(SHAPES[k]) for k, v in f.items()} for f in by_filter]
    for k in range(2):
        save_sharded(models[k], tmp_path / f"m{k}")
        save_sharded(by_filter[k], tmp_path / f"f{k}")
    merge_checkpoints([tmp_path / "m0", tmp_path / "m1"], [tmp_path / "f0", tmp_path / "f1"], tmp_path / "merged")
    assert_equal(everything(tmp_path / "merged"), fisher_merge(models, full))


def test_no_model_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "PIECE", 1000)
    seen: list[int] = []
    read = Checkpoint.read

    def watched(self: Checkpoint, name: str, part: slice = slice(None)) -> Tensor:
        seen.append(read(self, name, part).numel())
        return read(self, name, part)

    monkeypatch.setattr(Checkpoint, "read", watched)
    for k in range(2):
        save_sharded({"w": torch.full((400, 100), k + 1.0)}, tmp_path / f"m{k}")
        save_sharded({"w": torch.ones(400, 100)}, tmp_path / f"f{k}")
    merge_checkpoints([tmp_path / "m0", tmp_path / "m1"], [tmp_path / "f0", tmp_path / "f1"], tmp_path / "merged")
    assert max(seen) == 1000
    monkeypatch.setattr(Checkpoint, "read", read)
    torch.testing.assert_close(everything(tmp_path / "merged")["w"], torch.full((400, 100), 1.5))


def test_checkpoints_refuse(tmp_path: Path) -> None:
    good, other = model(1), model(2)
    save_sharded(good, tmp_path / "m0")
    save_sharded(other, tmp_path / "m1")
    save_sharded(importance(1), tmp_path / "f0")
    cases = {
        "two": ({k: v for k, v in other.items() if k != "scale"}, None, "having or lacking 'scale'"),
        "shape": (other | {"b.weight": torch.ones(5, 4)}, None, r"'b.weight' is \[5, 4\] in .*, expected \[4, 5\]"),
        "stranger": (other, {"c.weight": torch.ones(2)}, "has a Fisher of 'c.weight', which .* lacks"),
        "fits": (other, {"b.weight": torch.ones(5)}, r"is \[5\], expected the parameter's \[4, 5\] or .* \[4\]"),
        "negative": (other, {"a.bias": -torch.ones(5)}, "'a.bias' in .* has values that are negative or not finite"),
        "nan": (other, {"a.bias": torch.full((5,), torch.nan)}, "'a.bias' in .* negative or not finite"),
        "model": (other | {"a.bias": torch.full((5,), torch.inf)}, None, r"'a.bias' in .*model.m has values"),
        "zero": (other, {"a.bias": torch.zeros(5)}, r"is 0\.0 in all, expected a positive number"),
    }
    for name, (second, found, message) in cases.items():
        save_sharded(second, tmp_path / name / "m")
        save_sharded(found or importance(2), tmp_path / name / "f")
        paths = [tmp_path / "m0", tmp_path / name / "m"], [tmp_path / "f0", tmp_path / name / "f"]
        with pytest.raises(ValueError, match=message):
            merge_checkpoints(*paths, tmp_path / name / "merged")
        assert not list((tmp_path / name).glob("merged/*"))  # nothing half-written
    with pytest.raises(ValueError, match="2 models, 1 Fishers"):
        merge_checkpoints([tmp_path / "m0", tmp_path / "m1"], [tmp_path / "f0"], tmp_path / "merged")
    save_sharded({"a.bias": torch.eye(5)[0]}, tmp_path / "f1")
    with pytest.raises(ValueError, match=r"'a\.bias' has entries that all Fishers give no weight"):
        merge_checkpoints([tmp_path / "m0"], [tmp_path / "f1"], tmp_path / "merged", floor=0)
    with pytest.raises(FileNotFoundError, match="no folder with such files"):
        Checkpoint(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "m0" / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"broken\.safetensors is no complete safetensors file"):
        Checkpoint(tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=r"got 8 bytes of values, expected 4"):
        checkpoints.write_file(tmp_path / "w", {"w": checkpoints.Entry(torch.float32, (1,))}, [torch.ones(2)])
    assert not (tmp_path / "w").exists()
    sharded = tmp_path / "sharded"
    save_sharded(good, sharded, 100)
    index = json.loads((sharded / checkpoints.INDEX).read_text())
    index["weight_map"]["gone"] = sorted(set(index["weight_map"].values()))[0]
    (sharded / checkpoints.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="has 'gone', but it has not"):
        Checkpoint(sharded)


def test_keys_with_and_without_a_prefix() -> None:
    assert keys_of(["h.0.w", "lm_head.w"], ["h.0.w", "lm_head.w"]) == {"h.0.w": "h.0.w", "lm_head.w": "lm_head.w"}
    assert keys_of(["transformer.h.0.w"], ["h.0.w"]) == {"transformer.h.0.w": "h.0.w"}
    assert keys_of(["h.0.w"], ["transformer.h.0.w"]) == {"h.0.w": "transformer.h.0.w"}
    with pytest.raises(ValueError, match=r"no tensor for the parameter 'h\.1\.w'"):
        keys_of(["h.1.w"], ["h.0.w"])


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="the command loads models with it")
    config = transformers.GPT2Config(
        vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=9, bos_token_id=0, eos_token_id=0
    )
    tokens = torch.randint(0, 11, (5, 6), generator=torch.Generator().manual_seed(0))
    there = torch.ones_like(tokens)
    there[1, 3:] = 0
    save_file({"input_ids": tokens, "attention_mask": there}, tmp_path / "texts.safetensors")
    networks = []
    for k in range(2):
        torch.manual_seed(k)
        networks.append(transformers.GPT2LMHeadModel(config).eval())
        networks[k].save_pretrained(tmp_path / f"m{k}", max_shard_size="1KB")
        command = ["fisher", str(tmp_path / f"m{k}"), str(tmp_path / "texts.safetensors"), "--batch-size", "2"]
        command += ["--output", str(tmp_path / f"f{k}"), "--estimator", "exact", "--shard-bytes", "900"]
        assert main(command) == 0
    assert "from 5 texts" in capsys.readouterr().out
    found = everything(tmp_path / "f0")
    with Checkpoint(tmp_path / "m0") as checkpoint:
        assert found.keys() <= checkpoint.entries.keys()
    want = fisher(
        networks[0],
        [next_tokens({"input_ids": tokens, "attention_mask": there})],
        "exact",
        granularity="parameter",
        mask=lambda inputs, labels: labels != -100,
    )
    assert len(want) == len(found)
    for name, value in want.items():
        torch.testing.assert_close(found[keys_of([name], found)[name]].double(), value, rtol=1e-4, atol=1e-12)
    batches = zip(tokens.split(2), there.split(2), strict=True)
    batches = [next_tokens({"input_ids": t, "attention_mask": m}) for t, m in batches]
    for number, (level, estimator) in enumerate((("sequence", "empirical"), ("token", "hutchinson"))):
        folder = tmp_path / f"random{number}"
        command = ["fisher", str(tmp_path / "m0"), str(tmp_path / "texts.safetensors"), "--batch-size", "2"]
        command += ["--output", str(folder), "--estimator", estimator, "--level", level, "--samples", "2"]
        assert main(command) == 0
        want = fisher(  # with the same random numbers
            networks[0],
            [
                next_tokens({"input_ids": t, "attention_mask": m})
                for t, m in zip(tokens.split(2), there.split(2), strict=True)
            ],
            estimator,
            2,
            "parameter",
            mask=lambda inputs, labels: labels != -100,
            level=level,
            shift_labels=False,
        )
        found = everything(folder)
        for name, value in want.items():
            torch.testing.assert_close(found[keys_of([name], found)[name]].double(), value, rtol=1e-4, atol=1e-12)
    paths = [[str(tmp_path / f"{letter}{k}") for k in range(2)] for letter in "mf"]
    assert main(["merge", *paths[0], "--fishers", *paths[1], "--output", str(tmp_path / "merged")]) == 0
    merged_keys = everything(tmp_path / "merged").keys()
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged")  # configuration, index and all
    states = [everything(Path(path)) for path in paths[0]]
    want = fisher_merge(states, [everything(Path(path)) for path in paths[1]])
    torch.testing.assert_close(
        merged.transformer.wte.weight, want[keys_of(["transformer.wte.weight"], want)["transformer.wte.weight"]]
    )
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
    for k, name in enumerate(("first", "second")):
        (tmp_path / f"m{k}").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merged").rename(tmp_path / "before")
    (block,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    for command in block.splitlines():
        assert main(shlex.split(command)[1:]) == 0, command
    assert everything(tmp_path / "merged").keys() == merged_keys
    paths = [["first", "second"], ["first-fisher", "second-fisher"]]
    assert main(["merge", *paths[0], "--fishers", paths[1][0], "--output", str(tmp_path / "no")]) == 1
    assert "2 models, 1 Fishers" in capsys.readouterr().err


def test_a_merge_writes_to_no_input(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (4, 3)

    def some(*sizes: int) -> Tensor:
        return torch.rand(*sizes, generator=generator, dtype=torch.float64)

    models = [{"w": some(*shape)} for _ in range(3)]
    fishers = [{"w": some(4)}, {"w": some(*shape)}, {"w": some(4)}]  # by filter, by entry, by filter
    for k in range(3):
        save_sharded(models[k], tmp_path / f"m{k}")
        save_sharded(fishers[k], tmp_path / f"f{k}")
    before = [{"w": t["w"].clone()} for t in (*models, *fishers)]
    paths = [[tmp_path / f"{letter}{k}" for k in range(3)] for letter in "mf"]
    merge_checkpoints(*paths, tmp_path / "merged", [1, 2, 3], normalize=False, floor=0.1, minimum=0.2)
    importance = [
        w * (f["w"].clamp_min(0.2).reshape(4, -1).expand(shape) + 0.1) for w, f in zip([1, 2, 3], fishers, strict=True)
    ]
    wanted = sum(f * m["w"] for f, m in zip(importance, models, strict=True)) / sum(importance)
    with Checkpoint(tmp_path / "merged") as merged:
        torch.testing.assert_close(merged.read("w"), wanted)
    every = [{"w": f["w"].reshape(4, -1).expand(shape).clone()} for f in fishers]
    kept = [f["w"].clone() for f in every]
    fisher_merge(models, every)
    merge_unscaled(models, every)
    assert all(torch.equal(f["w"], k) for f, k in zip(every, kept, strict=True))
    assert all(torch.equal(t["w"], b["w"]) for t, b in zip((*models, *fishers), before, strict=True))
    for k in range(3):
        with Checkpoint(tmp_path / f"m{k}") as model, Checkpoint(tmp_path / f"f{k}") as found:
            assert torch.equal(model.read("w"), models[k]["w"])
            assert torch.equal(found.read("w"), fishers[k]["w"])
