"""The mask on disk."""

import pickle
from pathlib import Path

import pytest
import torch

from salun_lightning.saliency import SaliencyMask, mask_file
from tests.saliency.test_mask import random_booleans


@pytest.fixture
def mask() -> SaliencyMask:
    return SaliencyMask(random_booleans(0), ratio=0.5, metadata={"score": "gradient", "network": "0123", "data": "é"})


def test_what_is_saved_is_loaded(mask, tmp_path):
    mask.save(tmp_path / "new" / "folder" / "mask.safetensors")
    loaded = SaliencyMask.load(str(tmp_path / "new" / "folder" / "mask.safetensors"))
    assert loaded == mask
    assert list(loaded) == list(mask)
    assert loaded.shapes == mask.shapes
    assert (loaded.ratio, loaded.num_kept) == (0.5, mask.num_kept)
    assert loaded.metadata == {**mask.metadata, "library_version": "0.1.0"}
    loaded.save(tmp_path / "again.safetensors")
    assert SaliencyMask.load(tmp_path / "again.safetensors").metadata == loaded.metadata


@pytest.mark.parametrize("ratio", [0, 1, 1 / 3, torch.tensor(0.5).double().numpy()[()]])
def test_any_ratio_survives(ratio, tmp_path):
    SaliencyMask({"a": torch.ones(3)}, ratio=ratio).save(tmp_path / "mask")
    assert SaliencyMask.load(tmp_path / "mask").ratio == ratio


def test_masks_of_nothing_and_of_several_empty_tensors_survive(tmp_path):
    for number, given in enumerate(({}, {"a": torch.ones(0), "b": torch.ones(0, 3), "c": torch.tensor(1)})):
        SaliencyMask(given).save(tmp_path / str(number))
        assert SaliencyMask.load(tmp_path / str(number)) == SaliencyMask(given)


def test_a_file_takes_one_bit_a_weight(tmp_path):
    mask = SaliencyMask({"a": torch.rand(3000, 1000) > 0.5, "b": torch.rand(1001) > 0.5})
    mask.save(tmp_path / "mask.safetensors")
    header = 1024  # names, shapes and provenance
    assert (tmp_path / "mask.safetensors").stat().st_size * 8 <= 1.01 * mask.num_weights + 8 * header


def test_a_truncated_file_is_refused(mask, tmp_path):
    path = tmp_path / "mask.safetensors"
    mask.save(path)
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"mask.safetensors' cannot be read as a saliency mask"):
            SaliencyMask.load(path)


def test_bits_that_do_not_fit_the_shapes_are_refused(mask):
    state = mask.state_dict()
    for damaged in (
        {**state["bits"], "a": state["bits"]["a"][:1]},
        {**state["bits"], "a": state["bits"]["a"].int()},
        {name: bits for name, bits in state["bits"].items() if name != "a"},
    ):
        with pytest.raises(ValueError, match=r"bits of 'a' do not fit its shape \(13,\): the mask is damaged"):
            SaliencyMask.from_state_dict({**state, "bits": damaged})


def test_a_state_dict_is_plain_data_that_torch_reads_without_code(mask, tmp_path):
    torch.save(mask.state_dict(), tmp_path / "state.pt")
    again = SaliencyMask.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again == mask
    assert (again.ratio, again.metadata) == (mask.ratio, mask.metadata)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no saliency mask at '.*absent\.safetensors'"):
        SaliencyMask.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("name", ["notes.safetensors", "notes.pt", "notes.ckpt"])
def test_a_text_file_is_refused(name, tmp_path):
    (tmp_path / name).write_text("not a mask")
    with pytest.raises(ValueError, match="cannot be read as a saliency mask"):
        SaliencyMask.load(tmp_path / name)


def test_safetensors_of_another_kind_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"not written by SaliencyMask\.save"):
        SaliencyMask.load(tmp_path / "weights.safetensors")


class _Touch:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["evil.pt", "evil.pth", "evil.ckpt", "evil.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_executed(name, zipped, tmp_path):
    harm, path = tmp_path / "harm", tmp_path / name
    if zipped:
        torch.save({"conv.weight": _Touch(harm)}, path)
    else:
        path.write_bytes(pickle.dumps({"conv.weight": _Touch(harm)}))
    with pytest.raises(ValueError, match="cannot be read as a saliency mask"):
        SaliencyMask.load(path)
    assert not harm.exists()


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_mask_of_the_released_code_is_read(prefix, tmp_path):
    given = random_booleans(0)
    torch.save({f"{prefix}{name}": booleans.long() for name, booleans in given.items()}, tmp_path / "with_0.5.pt")
    mask = SaliencyMask.load(tmp_path / "with_0.5.pt")
    assert mask == SaliencyMask(given)
    assert mask.ratio == mask.num_kept / mask.num_weights
    assert mask.metadata == {"source": "released SalUn code"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"conv.weight": torch.tensor([0.0, 0.5])}, "'conv.weight' is not a tensor of zeros and ones"),
        ({"conv.weight": [0, 1]}, "'conv.weight' is not a tensor of zeros and ones"),
        ({"callbacks": {"ModelCheckpoint": {}}, "state_dict": {}}, "checkpoint of a run without SaliencyMasking"),
        ([torch.ones(2)], "not a dictionary"),
        (torch.ones(2), "not a dictionary"),
    ],
)
def test_other_pickles_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=message):
        SaliencyMask.load(tmp_path / "weights.pt")


def test_a_save_that_fails_leaves_what_was_there(mask, tmp_path, monkeypatch):
    def fail_half_way(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    other = ~mask
    other.save(tmp_path / "there.safetensors")
    monkeypatch.setattr(mask_file, "save_file", fail_half_way)
    for name in ("there.safetensors", "new.safetensors"):
        with pytest.raises(OSError, match="No space left"):
            mask.save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]
    assert SaliencyMask.load(tmp_path / "there.safetensors") == other


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_safetensors_of_zeros_and_ones_are_read(dtype, tmp_path):
    from safetensors.torch import save_file

    given = random_booleans(0)
    save_file({name: booleans.to(dtype) for name, booleans in given.items()}, tmp_path / "mask.safetensors")
    assert SaliencyMask.load(tmp_path / "mask.safetensors") == SaliencyMask(given)
    save_file({"a": torch.tensor([0, 2], dtype=torch.uint8)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="'a' is not a tensor of zeros and ones"):
        SaliencyMask.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", ["mask.pt", "mask.safetensors", "mask.bin", "mask"])
def test_content_tells_the_format_and_not_the_name(name, mask, tmp_path):
    given = random_booleans(0)
    mask.save(tmp_path / name)
    assert SaliencyMask.load(tmp_path / name) == mask
    for zipped in (True, False):
        torch.save(
            {key: booleans.long() for key, booleans in given.items()}, tmp_path / name, _use_new_zipfile_serialization=zipped
        )
        assert SaliencyMask.load(tmp_path / name) == SaliencyMask(given)


def test_a_refused_pickle_does_not_advise_to_switch_protection_off(tmp_path):
    torch.save({"conv.weight": _Touch(tmp_path / "harm")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="holds more than tensors and plain data, of which nothing was executed") as error:
        SaliencyMask.load(tmp_path / "evil.pt")
    assert "weights_only" not in str(error.value)
