import pytest

from support import files


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(files.DataError, match="No space left"), files.write_whole(path) as beside:
        beside.write_text("half", encoding="utf-8")
        raise OSError(28, "No space left on device")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]
