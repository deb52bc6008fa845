import pytest


@pytest.fixture
def lesson(load):
    return load("test_tb.py")


@pytest.mark.any_steps
def test_what_is_written_is_read_back(lesson, tmp_path):
    lesson.write_line(tmp_path, [3, 4, 8])
    assert lesson.read_scalars(tmp_path) == ([3, 4, 8], [0.0, 2.0, 4.0])


@pytest.mark.any_steps
def test_try_reversed_steps_are_all_kept_in_the_order_written(lesson, tmp_path):
    lesson.write_line(tmp_path, [5, 4, 3])
    assert lesson.read_scalars(tmp_path)[0] == [5, 4, 3]


@pytest.mark.any_steps
def test_main_measures_the_traps_also_when_run_again(lesson, insects_root, tmp_path):
    for _ in range(2):
        measured = lesson.main(log_dir=tmp_path, root=insects_root, points=12, pictures=14)
        steps = {run: line[0] for run, line in measured["lines"].items()}
        assert steps["with_step"] == list(range(12))
        assert steps["without_step"] == [0] * 12
        assert steps["two_writers"] == [*range(12), *range(6, 12)]
        assert steps["purged"] == list(range(12))
        assert measured["lines"]["purged"][1][6:] == [0, 2, 4, 6, 8, 10]
        assert measured["kept"] == {10: 10, 200: 14}
        assert "TypeError" in measured["error"]
        assert measured["size"] == (160, 120)
