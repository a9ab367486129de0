from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from cluster.engines.classifier.model.template import (
    Template,
    cut_ids,
    find_template,
    fit_pair,
)


def tokenizer(single: str, pair: str | None) -> Tokenizer:
    backend = Tokenizer(models.WordLevel({"[U]": 0, "[C]": 1, "[S]": 2, "a": 3, "b": 4}, "[U]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=pair or "$A:0 $B:1", special_tokens=[("[C]", 1), ("[S]", 2)]
    )
    return backend


def test_templates_are_found() -> None:
    bert = tokenizer("[C] $A [S]", "[C] $A [S] $B:1 [S]:1")
    assert find_template(bert, 1) == Template((1,), (), (2,))
    assert find_template(bert, 2) == Template((1,), (2,), (2,))
    assert find_template(bert, 2, marks_pair=True) == Template((1,), (2,), (~2,), True)
    roberta = tokenizer("[C] $A [S]", "[C] $A [S] [S] $B [S]")
    assert find_template(roberta, 2) == Template((1,), (2, 2), (2,))
    bare = tokenizer("$A", None)
    assert find_template(bare, 1) == Template((), (), ())


def test_rows_are_joined() -> None:
    template = Template((1,), (2,), (~2,), True)
    assert template.join([3], [3, 4]) == [1, 3, 2, ~3, ~4, ~2]
    assert Template((1,), (2, 2), (2,)).join([3], [4]) == [1, 3, 2, 2, 4, 2]
    assert Template((1,), (), (2,)).join([3, 4]) == [1, 3, 4, 2]


@given(st.integers(0, 40), st.integers(0, 40), st.integers(2, 50))
def test_pairs_are_cut_as_by_tokenizers(first: int, second: int, room: int) -> None:
    backend = tokenizer("$A", None)
    backend.enable_truncation(room, strategy="longest_first")
    encoding = backend.encode(" ".join("a" * first), " ".join("b" * second))
    lengths = encoding.ids.count(3), encoding.ids.count(4)
    assert fit_pair(first, second, room) == lengths


def test_cutting_on_either_side() -> None:
    assert cut_ids([1, 2, 3], 2, "right") == [1, 2]
    assert cut_ids([1, 2, 3], 2, "left") == [2, 3]
    assert cut_ids([1, 2, 3], 0, "left") == cut_ids([1, 2, 3], 0, "right") == []
