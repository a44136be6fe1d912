import io
import os
import socket
import subprocess
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedpeft.data.sources import walk as walking
from fedpeft.data.sources.file_names import FORMATS, class_name, image_suffixes, is_image, shown, suffix_of
from fedpeft.data.sources.folders import FolderSource
from fedpeft.data.sources.interface import SIZED, ImageUnreadable
from fedpeft.data.sources.inventory import SHOWN_REASONS, Entry, Fate, Inventory, inventory_of
from fedpeft.data.sources.opening import open_source
from fedpeft.data.sources.walk import walk
from fedpeft.errors import DataInvalid


def encoded(form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, form)
    return out.getvalue()


def tree(root: Path, *names: str) -> Path:
    """Makes files below a folder; a name that ends with a slash is a folder."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(encoded())
    return root


def fates(root: Path) -> dict[str, tuple[Fate, str]]:
    return {entry.path: (entry.fate, entry.reason) for entry in walk(root)}


def skipped(root: Path) -> dict[str, int]:
    return {group.reason: group.count for group in open_source(root).inventory.skipped}


@contextmanager
def another_user() -> Iterator[Path]:
    """A folder whose owner this thread is not, so that modes hold for it; a test that runs as root gives its rights up.

    Pillow's plugins are loaded first: that other user may not read them.
    """
    image_suffixes()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
        for path in folder.rglob("*"):
            if not path.is_symlink():
                path.chmod(0o755)


@contextmanager
def without_rights() -> Iterator[None]:
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(mine)


def test_the_order_is_that_of_the_paths(tmp_path):
    tree(tmp_path, "dog/b/1.png", "dog/b.png", "dog/a.png", "dog/b-1.png", "cat/z.png", "dog/B.png")
    paths = [entry.path for entry in walk(tmp_path)]
    assert paths == ["cat/z.png", "dog/B.png", "dog/a.png", "dog/b/1.png", "dog/b-1.png", "dog/b.png"]
    assert paths == sorted(paths, key=lambda path: path.split("/"))


def test_links_to_folders_are_followed_and_a_link_back_ends_the_walk(tmp_path):
    tree(tmp_path / "store", "p1/1.png", "p1/2.png", "cats/3.png")
    root = tree(tmp_path / "data", "dog/0.png", "dog/deep/4.png")
    (root / "dog" / "p1").symlink_to(tmp_path / "store" / "p1")
    (root / "cat").symlink_to(tmp_path / "store" / "cats")
    for name, to in (("self", "."), ("up", ".."), ("above", "../..")):
        (root / "dog" / "deep" / name).symlink_to(to)
    (root / "dog" / "out").symlink_to(tmp_path)
    found = fates(root)
    taken = [path for path, (fate, _) in found.items() if fate is Fate.TAKEN]
    assert taken == ["cat/3.png", "dog/0.png", "dog/deep/4.png", "dog/p1/1.png", "dog/p1/2.png"]
    loops = [path for path, (_, reason) in found.items() if reason == walking.LOOP]
    assert loops == ["dog/deep/above", "dog/deep/self", "dog/deep/up", "dog/out"]
    assert len(open_source(root)) == 5


def test_a_folder_that_is_reached_twice_is_read_once_and_said(tmp_path):
    root = tree(tmp_path, "dog/real/1.png", "cat/2.png")
    (root / "dog" / "again").symlink_to("real")
    (root / "cat" / "dogs").symlink_to("../dog")
    source = open_source(root)
    assert source.class_names == ("cat", "dog") and len(source) == 2
    assert skipped(root) == {walking.AGAIN: 1, walking.OTHER_CLASS: 1}


@pytest.mark.parametrize("level", ["class", "below"])
def test_one_folder_as_two_classes_is_refused(tmp_path, level):
    tree(tmp_path / "store", "1.png")
    root = tree(tmp_path / "data", "cat/", "dog/") if level == "below" else tree(tmp_path / "data", "./")
    for name in ("cat", "dog"):
        (root / (f"{name}/p1" if level == "below" else name)).symlink_to(tmp_path / "store")
    with pytest.raises(DataInvalid, match="is reached as class 'cat' and as class 'dog'"):
        open_source(root)


def test_suffixes_in_any_case_and_files_without_one_are_told_by_content(tmp_path):
    root = tree(tmp_path, *(f"dog/{n}" for n in ("a.PGM", "b.jfif", "c.Avif", "d", "e.0001", "f.jpg?w=2", "g.PnM")))
    (root / "dog" / "text").write_text("no image")
    (root / "dog" / "z.dcm").write_bytes(b"\0" * 128 + b"DICM")
    (root / "dog" / "a.txt").write_text("0 1 2 3")
    source = open_source(root)
    assert [source.name(row) for row in range(len(source))] == [
        f"dog/{n}" for n in ("a.PGM", "b.jfif", "c.Avif", "d", "e.0001", "f.jpg?w=2", "g.PnM")
    ]
    assert skipped(root) == {"with suffix .dcm": 1, "with suffix .txt": 1, walking.NO_IMAGE: 1}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_that_is_read_is_known_by_suffix_and_by_content(form):
    assert is_image(encoded(form))
    assert {suffix for suffix, known in Image.registered_extensions().items() if known == form} <= image_suffixes()


@pytest.mark.parametrize("head", [b"", b"P", b"%!PS-Adobe-3.0 EPSF", b"hello, world, this is", bytes(32)])
def test_what_is_no_image_is_not_taken_for_one(head):
    assert not is_image(head)


def test_what_storage_leaves_behind_is_skipped_and_counted(tmp_path):
    files = [f"cat/{i}.png" for i in range(3)]
    litter = ["cat/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "cat/._0.png", "cat/Thumbs.db", "__MACOSX/cat/._0.png"]
    litter += ["#recycle/1.png", "$RECYCLE.BIN/2.png", "lost+found/", "System Volume Information/a.png"]
    hidden = [".git/a.png", "cat/.DS_Store", "cat/.ipynb_checkpoints/0.png", ".AppleDouble/0.png"]
    source = open_source(tree(tmp_path, *files, *litter, *hidden))
    assert source.class_names == ("cat",) and len(source) == 3
    assert skipped(tmp_path) == {walking.SYSTEM: 8, walking.HIDDEN: 4}


def test_special_files_are_not_opened(tmp_path):
    root = tree(tmp_path, "cat/1.png")
    os.mkfifo(root / "cat" / "pipe.png")
    os.mkfifo(root / "cat" / "pipe")
    (root / "cat" / "link.png").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(root / "cat" / "socket.png"))
        assert skipped(root) == {walking.NOT_REGULAR: 4}


def test_dangling_links_are_images_that_cannot_be_read(tmp_path):
    root = tree(tmp_path, *(f"dog/{i}.png" for i in range(3)))
    for name in ("a.png", "b.JPG", "c"):
        (root / "dog" / name).symlink_to("../../.git/annex/objects/xx/SHA256E-s123--ab.png")
    (root / "dog" / "own.png").symlink_to("own.png")
    (root / "dog" / "notes.txt").symlink_to("nothing")
    source = open_source(root)
    assert len(source) == 7 and len(source.unreadable) == 4
    groups = {group.reason: group.count for group in source.inventory.unreadable}
    assert groups.pop(walking.DANGLING) == 3 and list(groups.values()) == [1]
    assert skipped(root) == {"with suffix .txt": 1}
    with pytest.raises(ImageUnreadable, match="link to nothing"):
        source.image_bytes(3)


def test_a_class_folder_that_leads_nowhere_is_not_lost(tmp_path):
    tree(tmp_path, "cat/1.png")
    (tmp_path / "dog").symlink_to("/nowhere/dog")
    with pytest.raises(DataInvalid, match=r"dog is a link to nothing, so its class would be lost"):
        open_source(tmp_path)


def test_a_folder_that_may_not_be_listed_counts_as_unreadable():
    with another_user() as root:
        tree(root, "cat/1.png", "dog/2.png", "dog/p1/3.png")
        (root / "dog" / "p1").chmod(0)
        (root / "cat" / "1.png").chmod(0)
        with without_rights():
            source = open_source(root)
            assert dict(source.unreadable) == {2: "folder that cannot be listed (Permission denied)"}
            assert source.inventory.lines() == [
                "cannot be read, folder that cannot be listed (Permission denied): 1 (dog/p1)"
            ]
            with pytest.raises(ImageUnreadable, match="it cannot be read: Permission denied"):
                source.image_bytes(0)


def test_a_class_that_may_not_be_listed_is_named():
    with another_user() as root:
        tree(root, "cat/1.png", "dog/2.png")
        (root / "dog").chmod(0)
        with without_rights(), pytest.raises(DataInvalid, match="class 'dog' has no image that can be read: folder"):
            open_source(root)


def test_a_class_whose_files_all_are_skipped_is_an_error_that_says_why(tmp_path):
    tree(tmp_path, "cat/1.png", "dog/a.heic", "dog/b.heic", "empty/", "hidden/.gitkeep")
    with pytest.raises(DataInvalid, match=r"class 'dog' has no image that can be read: with suffix .heic: 2 \(dog/a"):
        open_source(tmp_path)
    for file in (tmp_path / "dog").iterdir():
        file.unlink()
    source = open_source(tmp_path)
    assert source.class_names == ("cat", "dog", "empty", "hidden")  # as good as empty: a class may have no rows
    assert skipped(tmp_path) == {walking.EMPTY: 2, walking.HIDDEN: 1}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["0.png", "1.png", "metadata.csv"], r"no image in a subfolder.*outside the class folders: 3 \(0.png"),
        (["data/train-0.parquet", "README.md"], r"there is parquet in its subfolders data: name one of them.*/data$"),
        (["train/cat/1.png", "val/cat/1.png"], r"holds splits \(train, val\), which are no classes"),
        (["train/cat/1.png"], r"holds splits \(train\)"),
        (["Training/1.png", "HoldOut/1.png", "other/2.png"], r"holds splits \(HoldOut, Training\)"),
        (["default/train/0.parquet", "default/test/0.parquet"], "no image in a subfolder"),
    ],
)
def test_what_is_no_folder_of_classes_is_said(tmp_path, names, message):
    with pytest.raises(DataInvalid, match=message):
        open_source(tree(tmp_path, *names))


def test_a_class_may_be_called_train(tmp_path):
    assert open_source(tree(tmp_path / "a", "bus/1.png", "train/2.png")).class_names == ("bus", "train")
    assert open_source(tree(tmp_path / "b", "train/2.png")).class_names == ("train",)


def test_images_beside_the_class_folders_are_told(tmp_path):
    assert skipped(tree(tmp_path, "cat/1.png", "stray.png", "README.md")) == {walking.OUTSIDE: 2}


def test_class_names_are_in_nfc_and_two_spellings_of_one_are_one_class(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    source = open_source(tree(tmp_path, f"{nfd}/1.png", f"{nfc}/2.png", "Cat/3.png", "cat/4.png"))
    assert source.class_names == ("Cat", "caf\u00e9", "cat")
    assert Counter(source.column("label")) == {"Cat": 1, "caf\u00e9": 2, "cat": 1}


def test_names_that_are_not_utf8_can_be_printed(tmp_path):
    root = tree(tmp_path, "cat/1.png")
    folder = os.fsencode(root) + b"/m\xe4nnlich"
    os.mkdir(folder)
    for name in (b"/\xe4.png", b"/two\nlines.png", b"/\xe4.dcm"):
        with open(folder + name, "wb") as file:
            file.write(encoded())
    source = open_source(root)
    assert source.class_names == ("cat", r"m\xe4nnlich")
    assert [source.name(row) for row in range(3)] == [
        "cat/1.png",
        r"m\xe4nnlich/two\nlines.png",
        r"m\xe4nnlich/\xe4.png",
    ]
    assert source.image_bytes(2) == encoded()
    rows = [row for table in source.tables(source.labels.nonzero()[0]) for row in table.to_pylist()]
    assert rows[1]["image"] == {"bytes": encoded(), "path": r"m\xe4nnlich/\xe4.png"}
    "\n".join(source.inventory.lines()).encode()


def test_a_tree_deeper_than_pythons_stack(tmp_path):
    root, depth = tmp_path / "data", 1500
    (root / "cat").mkdir(parents=True)
    here = os.open(root / "cat", os.O_RDONLY)
    try:
        for _ in range(depth):
            os.mkdir("d", dir_fd=here)
            inner = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = inner
        os.close(os.open("1.png", os.O_CREAT | os.O_WRONLY, dir_fd=here))
        (entry,) = walk(root)
        assert entry.fate is Fate.TAKEN and entry.path.count("/") == depth + 1
    finally:
        os.close(here)
        subprocess.run(["rm", "-rf", str(root)], check=True)  # Python's own removal is recursive


def test_sizes_are_reckoned_from_some_files(tmp_path, monkeypatch):
    root = tree(tmp_path, *(f"cat/{i}.png" for i in range(30)))
    exact = FolderSource(root).image_bytes_total
    assert exact == 30 * len(encoded()) and SIZED > 30
    monkeypatch.setattr("fedpeft.data.sources.interface.SIZED", 4)
    assert FolderSource(root).image_bytes_total == exact


ENTRIES = st.lists(
    st.builds(
        Entry,
        st.text("abc/", min_size=1),
        st.sampled_from(("cat", "dog")),
        st.sampled_from((Fate.SKIPPED, Fate.UNREADABLE)),
        st.sampled_from(("one", "two")),
    )
    | st.builds(Entry, st.text("abc/", min_size=1), st.just("cat"), st.just(Fate.TAKEN))
)


@given(ENTRIES, ENTRIES)
def test_an_inventory_loses_no_entry_and_adds_up(first, second):
    whole = inventory_of([*first, *second])
    groups = [*whole.unreadable, *whole.skipped]
    assert whole.taken + sum(group.count for group in groups) == len(first) + len(second)
    assert Inventory.sum((inventory_of(first), inventory_of(second))) == whole
    assert Inventory.of_dict(whole.as_dict()) == whole


def test_many_reasons_are_summed_up():
    found = inventory_of(Entry(f"a.{k}", "cat", Fate.SKIPPED, f"with suffix .{k}") for k in range(SHOWN_REASONS + 5))
    assert found.lines()[-1] == "skipped, 5 other reasons: 5"


@given(st.binary(min_size=1, max_size=12).filter(lambda name: b"\0" not in name))
def test_any_name_can_be_printed(name):
    text = os.fsdecode(name)
    assert shown(text).isprintable()
    class_name(text).encode()
    assert suffix_of(text) == suffix_of(text).lower()
