"""Half-done scoring on disk."""

import pytest

from evaluation import scoring
from evaluation.backends import BackendError, Generation
from evaluation.journal import Journal
from evaluation.tasks import Item

ITEMS = [Item(f"i{n}", "addition", f"{n} + 1", f"{n + 1}", {"answer": f"{n + 1}"}) for n in range(10)]


class Backwards:
    """Finishes the last item first, and gives up after some."""

    name, version, device_class = "backwards", "1", "cpu"

    def __init__(self, gives_up_after=100):
        self.left, self.asked = gives_up_after, []

    def generate_many(self, item_prompts, max_tokens, stop):
        for place in reversed(range(len(item_prompts))):
            if self.left == 0:
                raise BackendError("gone")
            self.left -= 1
            self.asked.append(item_prompts[place])
            text = str(int(item_prompts[place].split()[0]) + 1)
            yield place, Generation(text, 5, 1, 0, None, None, "stop")


def ask(backend, journal, split="test"):
    return scoring.ask(backend, ITEMS, split, max_tokens=4, stop=[], journal=journal)


def test_rows_are_in_the_items_order_whatever_was_finished_first(tmp_path):
    with Journal(tmp_path / "a/b.jsonl") as journal:
        results = ask(Backwards(), journal)
    assert [row["item_id"] for row, _ in results] == [i.id for i in ITEMS]
    assert all(score.correct and row["answer"] == row["truth"] for row, score in results)


def test_what_is_done_is_not_asked_again(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal, pytest.raises(BackendError, match="gone. 4 of 10 items of test are done and kept"):
        ask(Backwards(4), journal)
    rest = Backwards()
    with Journal(path) as journal:
        assert (journal.resumed, len(journal)) == (4, 4)
        resumed = ask(rest, journal)
    assert rest.asked == [i.prompt for i in reversed(ITEMS[:6])]
    with Journal(tmp_path / "fresh.jsonl") as journal:
        assert resumed == ask(Backwards(), journal)


def test_two_splits_may_share_ids(tmp_path):
    with Journal(tmp_path / "j.jsonl") as journal:
        ask(Backwards(), journal)
        second = Backwards()
        ask(second, journal, "retention")
        assert len(second.asked) == 10 and len(journal) == 20


@pytest.mark.parametrize("broken", [b'{"split": "test", "item_id": "i', b"\x00\x00\x00\n", b'{"item_id": "i2"}\n',
                                    b'{"split": "test", "item_id": "i1", "answer": 3, "prompt_tokens": 1, '
                                    b'"answer_tokens": 1}\n', b"\xff\xfe\n", b"[1]\n"])  # fmt: skip
def test_a_broken_line_costs_its_own_item_only(tmp_path, broken):
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        whole = ask(Backwards(), journal)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + broken)
    rest = Backwards()
    with Journal(path) as journal:
        assert journal.resumed == 5
        assert ask(rest, journal) == whole
    assert len(rest.asked) == 5
    with Journal(path) as journal:
        assert journal.resumed == 10  # the file is whole again


def test_an_answer_cannot_be_kept_twice(tmp_path):
    row = {"split": "s", "item_id": "i", "answer": "\ud800 \n\u2028", "prompt_tokens": None, "answer_tokens": None}
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.add(row)
        with pytest.raises(ValueError, match="one answer for each item"):
            journal.add(row)
    with Journal(tmp_path / "j.jsonl") as journal:
        assert journal.get("s", "i") == row


def test_without_a_journal_nothing_is_said_to_be_kept():
    with pytest.raises(BackendError, match="3 of 10 items of test are done$"):
        ask(Backwards(3), None)


def test_a_backend_that_leaves_items_out_is_found(tmp_path):
    class Lazy(Backwards):
        def generate_many(self, *args):
            yield from list(super().generate_many(*args))[:-2]

    with pytest.raises(BackendError, match="left 2 of 10 items of test out"):
        ask(Lazy(), None)
