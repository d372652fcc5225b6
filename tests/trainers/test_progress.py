"""Lines of progress where there is no terminal."""

import types

import pytest

from trainers.progress import ProgressLines, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (125, "2 min 5 s"),
        (3599.7, "1 h 0 min"),
        (12000, "3 h 20 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.fixture
def talk():
    """The callback, its lines, and a step function: (steps, seconds, loss) from where it stands."""
    lines, now, state = [], [1000.0], types.SimpleNamespace(global_step=0, max_steps=500, is_world_process_zero=True)
    progress = ProgressLines("train pure_grit-0", write=lines.append, clock=lambda: now[0])

    def go_on(steps, seconds, **logs):
        state.global_step += steps
        now[0] += seconds
        if "eval_loss" in logs:
            progress.on_evaluate(None, state, None, metrics=logs)
        progress.on_log(None, state, None, logs=logs)

    return progress, state, lines, go_on


def test_a_line_at_most_every_half_minute(talk):
    progress, state, lines, go_on = talk
    progress.on_train_begin(None, state, None)
    for i in range(10):
        go_on(10, 7.0, loss=1.0 / (i + 1))
        if i == 3:
            go_on(0, 0.0, eval_loss=0.75)
    assert lines == [
        "train pure_grit-0: 500 steps",
        "train pure_grit-0: step 50/500, loss 0.2, 0.7 s/step, 5 min 15 s left, evaluation loss 0.75",
        "train pure_grit-0: step 100/500, loss 0.1, 0.7 s/step, 4 min 40 s left, evaluation loss 0.75",
    ]
    go_on(400, 1.0, loss=0.05)
    progress.on_train_end(None, state, None)
    assert lines[3:] == ["train pure_grit-0: step 500/500, loss 0.05, 0.142 s/step, evaluation loss 0.75"]


def test_a_resumed_run_counts_its_own_steps_and_an_early_end_is_said(talk):
    progress, state, lines, go_on = talk
    state.global_step = 300
    progress.on_train_begin(None, state, None)
    go_on(100, 50.0, loss=2.0)
    progress.on_train_end(None, state, None)
    assert lines == [
        "train pure_grit-0: 500 steps from step 300",
        "train pure_grit-0: step 400/500, loss 2, 0.5 s/step, 50 s left",
        "train pure_grit-0: step 400/500, loss 2, 0.5 s/step, stopped early",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [False, True])
def test_lines_in_a_log_and_a_bar_on_a_terminal(make_job, monkeypatch, capsys, terminal):
    import sys

    from trainers.baseline_lora import ARM
    from trainers.common import run

    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    run(ARM, make_job())
    out, err = capsys.readouterr()
    assert ("train baseline_lora-0: step 12/12, loss " in err) != terminal
    assert ("12/12 [00:" in err) == terminal
    assert "'loss'" not in out or terminal  # transformers' PrinterCallback
    assert "\x1b[3" not in out + err  # no colours
