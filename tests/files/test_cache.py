"""The folder of what is kept between runs."""

from secateur.files.cache import cache_folder


def test_where_results_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("SECATEUR_CACHE")
    assert cache_folder() == tmp_path / "shared" / "secateur"
    for none in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", none)
        assert cache_folder() == tmp_path / ".cache" / "secateur"
