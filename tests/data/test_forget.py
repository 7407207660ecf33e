"""Forget requests."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser

import salun_lightning
from salun_lightning.data import ForgetClasses, ForgetConcepts, ForgetIndices, ForgetRandom, ForgetRequest
from tests.small import small_datamodule

NAMES = ["cat", "dog", "owl"]
TARGETS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
ALL = torch.arange(10)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["cat"], [0, 3, 6, 9]),
        ("cat", [0, 3, 6, 9]),
        (1, [1, 4, 7]),
        ([1], [1, 4, 7]),
        (["owl", 1], [1, 2, 4, 5, 7, 8]),
        (np.int64(1), [1, 4, 7]),
        (np.array([1, 2]), [1, 2, 4, 5, 7, 8]),
        ([2, "owl", 2], [2, 5, 8]),
        ([], []),
    ],
)
def test_classes_by_name_and_number(names: Any, expected: list[int]) -> None:
    assert ForgetClasses(names).indices(TARGETS, NAMES, ALL).tolist() == expected


def test_classes_out_of_what_is_trained() -> None:
    assert ForgetClasses(["cat"]).indices(TARGETS, NAMES, torch.tensor([1, 3, 9])).tolist() == [3, 9]


def test_a_name_goes_before_a_number() -> None:
    assert ForgetClasses([1]).classes(["1", "10", "2"]) == [0]


@pytest.mark.parametrize("name", ["bird", -1, 3, "1", True, 1.0, None])
def test_unknown_class(name: Any) -> None:
    with pytest.raises(ValueError, match=rf"There is no class '{name}'. The classes are: cat, dog, owl."):
        ForgetClasses([name]).indices(TARGETS, NAMES, ALL)


# Literal positions: a forget request must mean the same images with every version of this library and of NumPy.
@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (ForgetRandom(count=5, seed=0), [2, 10, 13, 26, 28]),
        (ForgetRandom(fraction=0.1, seed=0), [2, 13, 28]),
        (ForgetRandom(fraction=0.1, seed=1), [10, 17, 21]),
        (ForgetRandom(count=4, seed=7, within_class=1), [1, 7, 16, 25]),
    ],
)
def test_random_draws_are_pinned(request_: ForgetRandom, expected: list[int]) -> None:
    targets = torch.arange(30) % 3
    assert request_.indices(targets, NAMES, torch.arange(30)).tolist() == expected


def test_random_draws_from_what_is_trained() -> None:
    trained = torch.arange(0, 1000, 2)
    drawn = ForgetRandom(fraction=0.3, seed=3).indices(torch.zeros(1000, dtype=torch.int64), ["cat"], trained)
    assert len(drawn) == 150
    assert torch.isin(drawn, trained).all()
    assert (drawn.diff() > 0).all()


def test_random_within_a_class() -> None:
    drawn = ForgetRandom(fraction=0.5, within_class="cat").indices(TARGETS, NAMES, ALL)
    assert len(drawn) == 2
    assert (TARGETS[drawn] == 0).all()


def test_random_forgetting_leaves_the_test_set_alone() -> None:
    assert ForgetRandom(count=1, within_class="cat").classes(NAMES) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either fraction or count"),
        ({"fraction": 0.1, "count": 3}, "either fraction or count"),
        ({"fraction": 0.0}, "must lie between 0 and 1, got 0.0"),
        ({"fraction": 1.2}, "must lie between 0 and 1, got 1.2"),
        ({"count": 0}, "must be positive, got 0"),
        ({"count": True}, "count .* whole number, got True"),
        ({"count": 2.5}, "count .* whole number, got 2.5"),
        ({"count": "3"}, "count .* whole number, got '3'"),
        ({"count": float("nan")}, "count .* whole number, got nan"),
        ({"fraction": float("nan")}, "must lie between 0 and 1, got nan"),
        ({"fraction": True}, "must lie between 0 and 1, got True"),
        ({"fraction": "0.1"}, "must lie between 0 and 1, got '0.1'"),
        ({"count": 1, "seed": True}, "seed .* got True"),
        ({"count": 1, "seed": float("nan")}, "seed .* got nan"),
        ({"count": 1, "seed": "1"}, "seed .* got '1'"),
        ({"count": 1, "seed": -1}, r"seed .* got -1"),
        ({"count": 1, "seed": 2**32}, "seed .* got 4294967296"),
    ],
)
def test_random_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ForgetRandom(**arguments)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ForgetRandom(count=11), "11 images are to be forgotten, but there are only 10"),
        (ForgetRandom(count=4, within_class="dog"), "4 images are to be forgotten, but there are only 3"),
        (ForgetRandom(count=1, within_class="bird"), "There is no class 'bird'"),
    ],
)
def test_random_asks_for_too_much(request_: ForgetRandom, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request_.indices(TARGETS, NAMES, ALL)


@pytest.mark.parametrize(
    "positions",
    [
        [7, 2, 2, 0],
        (0, 2, 7),
        np.array([2, 7, 0]),
        torch.tensor([7, 0, 2], dtype=torch.int32),
        [np.int64(7), torch.tensor(2), 0],
        [number in (0, 2, 7) for number in range(10)],
        torch.isin(torch.arange(10), torch.tensor([0, 2, 7])),
        np.isin(np.arange(10), [0, 2, 7]),
    ],
)
def test_indices_from_a_list(positions: Any) -> None:
    forget = ForgetIndices(positions).indices(TARGETS, NAMES, ALL)
    assert forget.tolist() == [0, 2, 7]
    assert forget.dtype == torch.int64


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])  # a byte order mark, as editors on Windows write it
def test_indices_from_a_file(tmp_path: Path, as_text: bool, start: bytes) -> None:
    path = tmp_path / "forget.txt"
    path.write_bytes(start + b"7\r\n\n 2 \n0\n0\n")
    assert ForgetIndices(str(path) if as_text else path).indices(TARGETS, NAMES, ALL).tolist() == [0, 2, 7]


def test_comments_in_a_file_of_indices(tmp_path: Path) -> None:
    (tmp_path / "forget.txt").write_text("# asked for in June, of 10 images\n7\n  # 3\n#\n0\n", encoding="utf-8")
    assert ForgetIndices(tmp_path / "forget.txt").indices(TARGETS, NAMES, ALL).tolist() == [0, 7]


def test_a_file_of_indices_beside_the_configuration_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "forget.txt").write_text("7\n0\n")
    (tmp_path / "configs" / "request.yaml").write_text(
        "forget: {class_path: ForgetIndices, init_args: {positions: forget.txt}}"
    )
    (tmp_path / "forget.txt").write_text("5\n")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--forget", type=ForgetRequest)
    monkeypatch.chdir(tmp_path)
    for words, expected in (
        (["--config=configs/request.yaml"], [0, 7]),
        (["--forget=ForgetIndices", "--forget.positions=forget.txt"], [5]),
    ):
        parsed = parser.parse_args(words)
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "config.yaml").write_text(parser.dump(parsed))  # the saved configuration means the same file
        for again in parsed, parser.parse_args(["--config=run/config.yaml"]):
            assert parser.instantiate(again).forget.indices(TARGETS, NAMES, ALL).tolist() == expected


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([False] * 5 + [True] * 3, "a mask of 8 images, but the training data has 10"),
        (torch.ones(11, dtype=torch.bool), "a mask of 11 images, but the training data has 10"),
        ([1.9, 2.2], "must be whole numbers, got 1.9"),
        ([1.0], "must be whole numbers, got 1.0"),
        (torch.tensor([2.0]), "must be whole numbers, got 2.0"),
        ([float("nan")], "must be whole numbers, got nan"),
        ([0, True], "must be whole numbers, got True"),
        ([True] * 9 + [0], "must be whole numbers, got True"),
        (["1", "2"], "must be whole numbers, got '1'"),
        ([None], "must be whole numbers, got None"),
        ([[1, 2]], r"must be whole numbers, got \[1, 2\]"),
        (torch.zeros(2, 2, dtype=torch.int64), r"must be whole numbers, got \[0, 0\]"),
        (5, "must be a list .* got 5"),
        (10**30, "must be a list .* got 1000"),
        ([10**30], f"Index {10**30} is out of range"),
        (torch.tensor(5), r"must be a list .* got tensor\(5\)"),
    ],
)
def test_indices_that_are_none(positions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ForgetIndices(positions).indices(TARGETS, NAMES, ALL)


@pytest.mark.parametrize(
    ("positions", "expected"), [("[2, 0]", [0, 2]), (str([number == 2 for number in range(10)]).lower(), [2])]
)
def test_indices_on_the_command_line(positions: str, expected: list[int]) -> None:
    assert parsed(f"--forget=ForgetIndices --forget.positions={positions}".replace(", ", ",")).tolist() == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("ForgetIndices --forget.positions=[1.9,2.2]", "must be whole numbers, got 1.9"),
        ("ForgetIndices --forget.positions=[0,true]", "must be whole numbers, got True"),
        ("ForgetIndices --forget.positions=[true,false]", "a mask of 2 images, but the training data has 10"),
        ("ForgetRandom --forget.count=true", "Expected a <class 'int'>"),
        ("ForgetRandom --forget.count=2.5", "Expected a <class 'int'>"),
        ("ForgetRandom --forget.fraction=.nan", "must lie between 0 and 1, got nan"),
        ("ForgetRandom --forget.count=1 --forget.seed=1.5", "Expected a <class 'int'>. Got value: 1.5"),
        ("ForgetRandom --forget.count=1 --forget.seed=-1", "seed .* got -1"),
        ("ForgetClasses --forget.names=[true]", "Given value: True"),
        ("ForgetClasses --forget.names=[1.5]", "Given value: 1.5"),
    ],
)
def test_requests_that_the_command_line_refuses(words: str, message: str) -> None:
    with pytest.raises((ValueError, ArgumentError), match=f"(?s){message}"):
        parsed(f"--forget={words}")


def parsed(words: str) -> torch.Tensor:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--forget", type=ForgetRequest)
    return parser.instantiate(parser.parse_args(words.split(" "))).forget.indices(TARGETS, NAMES, ALL)


@pytest.mark.parametrize("position", [-1, 10])
def test_index_out_of_range(position: int) -> None:
    with pytest.raises(ValueError, match=f"Index {position} is out of range: the training data has 10 images, numbered from 0"):
        ForgetIndices([0, position]).indices(TARGETS, NAMES, ALL)


def test_index_in_the_validation_set() -> None:
    with pytest.raises(ValueError, match="Image 4 is in the validation set: the model was never trained on it"):
        ForgetIndices([0, 4]).indices(TARGETS, NAMES, torch.tensor([0, 1, 2, 3]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"3\nfour\n", "Line 2 of '.*forget.txt' is not a position: 'four'"),
        (b"3\n1.5\n", "Line 2 of '.*forget.txt' is not a position: '1.5'"),
        (b"1_0\n", "Line 1 of '.*forget.txt' is not a position: '1_0'"),
        (b"+1\n", r"Line 1 of '.*forget.txt' is not a position: '\+1'"),
        (b"-1\n", "Line 1 of '.*forget.txt' is not a position: '-1'"),
        (b"\xd9\xa1\n", "Line 1 of '.*forget.txt' is not a position: '\u0661'"),  # the Arabic one, which int() reads
        (b"1\n" + b"9" * 5000, "Line 2 of '.*forget.txt' is not a position: '99"),
        (b"1\n" + b"9" * 30, f"Index {'9' * 30} is out of range"),
        (b"1 2\n", "Line 1 of '.*forget.txt' is not a position: '1 2'"),
        (b"# of 10\n1 # the cat\n", "Line 2 of '.*forget.txt' is not a position: '1 # the cat'"),
        (b"#" * 9 + b"\n// 3\n", "Line 2 of '.*forget.txt' is not a position: '// 3'"),
        (b"\xff\xfe\x00", "'.*forget.txt' is not a text file"),
        ("1\n2\n".encode("utf-16"), "'.*forget.txt' is not a text file .* UTF-8"),
        ("1\n2\n".encode("utf-16-le"), "Line 1 of '.*forget.txt' is not a position"),
    ],
)
def test_bad_file_of_indices(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "forget.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ForgetIndices(tmp_path / "forget.txt").indices(TARGETS, NAMES, ALL)


def test_missing_file_of_indices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no file of positions to forget at '.*nowhere.txt'"):
        ForgetIndices(tmp_path / "nowhere.txt").indices(TARGETS, NAMES, ALL)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ForgetIndices([]), "The forget set is empty: the request selects 0 of 60 training images"),
        (ForgetClasses([]), "The forget set is empty"),
        (ForgetRandom(fraction=0.001), "The forget set is empty"),
        (ForgetRandom(count=60), "The retain set is empty: the request selects 60 of 60 training images"),
        (ForgetClasses([0, 1, 2]), "The retain set is empty"),
    ],
)
def test_nothing_to_forget_or_nothing_to_retain(request_: ForgetRandom, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_datamodule(request_)


def test_the_module_of_requests_asks_the_package_for_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package imports everything to answer, and with that this module once more, which is not at its end."""

    def asked(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(salun_lightning, "__getattr__", asked)
    spec = importlib.util.find_spec("salun_lightning.data.forget")
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.ForgetRandom(count=1).count == 1


def test_concepts_are_whole_words_and_their_anchors_stand_in_each_prompt() -> None:
    prompts = ["a cat", "a cathedral", "A Cat beside a dog", "a dog", "two cats", "a cat, a cat"]
    request = ForgetConcepts({"cat": "horse", "a dog": "an ox"})
    assert request.classes(prompts) == [0, 2, 3, 5]
    assert request.anchors(prompts) == {0: "a horse", 2: "A horse beside an ox", 3: "an ox", 5: "a horse, a horse"}
    targets, trained = torch.tensor([0, 1, 2, 3, 4, 5, 0]), torch.tensor([0, 1, 2, 4, 6])
    assert request.indices(targets, prompts, trained).tolist() == [0, 2, 6]
    assert ForgetConcepts({"a cat": r"\1"}).anchors(prompts)[0] == r"\1"  # an anchor is text


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ({}, "No concept is named"),
        ({" ": "cat"}, "No concept is named"),
        ({"cat": "cat"}, "The anchor 'cat' of 'cat' names 'cat'"),
        ({"cat": "a CAT on a mat"}, "names 'cat', which is to be forgotten"),
        ({"cat": "dog", "dog": "horse"}, "The anchor 'dog' of 'cat' names 'dog'"),
    ],
)
def test_concepts_that_cannot_be_replaced_are_refused(concepts: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ForgetConcepts(concepts)


def test_an_anchor_that_makes_a_concept_of_what_stands_beside_it_is_refused() -> None:
    concepts = ForgetConcepts({"red ball": "a thing", "a blue": "a red"})
    with pytest.raises(ValueError, match="'a blue ball' becomes 'a red ball', which names 'red ball'"):
        concepts.anchors(["a blue ball", "a red ball"])


def test_letters_whose_case_is_of_two_characters() -> None:
    """A dotted capital I becomes two characters in lower case."""
    assert ForgetConcepts({"istanbul": "a city"}).replaced("\u0130stanbul at night")[0] == "a city at night"


def test_a_concept_that_no_prompt_names_is_refused() -> None:
    with pytest.raises(ValueError, match=r"No prompt names the concept 'owl'\. The prompts are a cat, a dog\."):
        ForgetConcepts({"cat": "horse", "owl": "horse"}).classes(["a cat", "a dog"])
