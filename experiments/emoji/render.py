"""Draws the demo's data set: the emoji of five vendors, in nine classes, a vendor a client.

    pip install resvg-py pillow pyarrow
    python experiments/emoji/render.py                 # needs npm
    python experiments/emoji/render.py --iconify DIR --unicode DIR

Run by hand, rarely; its result, `data/train.parquet` and `data/test.parquet`, is committed. Notable:

- the class of a drawing is the Unicode group of its emoji; what is no emoji, and skin tones, are left out;
- two vendors give no code points, so their drawings are found by name; a name that could mean two emoji is left out;
- the split is by emoji, never by drawing: no test emoji is in any vendor's training rows. Emoji that differ only in
  gender or direction, the clock faces, and flags that a vendor draws identically stay on the same side too;
- classes are capped (flags and people would be half of all rows otherwise), in units of emoji, so that a vendor that
  draws few of a class keeps few: label and quantity skew are the vendors' own;
- chosen by hashes and written in a fixed order: the same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import tarfile
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image

from fedpeft.process import durable

ICONIFY = "@iconify/json@2.2.535"
UNICODE = "unicode-emoji-json@0.9.0"
VENDORS = ("emojione", "fluent-emoji-flat", "fxemoji", "noto", "twemoji")
CLASSES = {
    "smileys": "Smileys & Emotion",
    "people": "People & Body",
    "animals": "Animals & Nature",
    "food": "Food & Drink",
    "travel": "Travel & Places",
    "activities": "Activities",
    "objects": "Objects",
    "symbols": "Symbols",
    "flags": "Flags",
}
NAMES = tuple(CLASSES)
SIZE = 56  # pixels, what the model sees
DRAWN_SIZE = 256  # drawn larger and averaged down: thin lines survive
LEVELS = 32  # a channel, evenly spaced with black and white among them: two fifths fewer bytes
TRAIN_PER_CLASS = 80  # emoji, not drawings
TEST_PER_CLASS = 20
TEST_SHARE = 0.2

_VARIATION = "fe0f"
_GENDERS = {"2640", "2642"}
_PERSONS = {"1f468", "1f469", "1f9d1"}
_CLOCKS = range(0x1F550, 0x1F568)


@dataclass(frozen=True)
class Drawing:
    """One emoji as one vendor draws it; `emoji` is its code points in hex, joined by hyphens."""

    vendor: str
    emoji: str
    label: int
    png: bytes


def emoji_groups(folder: Path) -> dict[str, tuple[str, int]]:
    """Each emoji's CLDR name and class index, by code points, without skin tones."""
    listed = json.loads((folder / "data-by-emoji.json").read_text(encoding="utf-8"))
    index = {group: number for number, group in enumerate(CLASSES.values())}
    return {
        _points(f"{ord(char):x}" for char in emoji): (entry["name"], index[entry["group"]])
        for emoji, entry in listed.items()
    }


def find_icons(sets: dict[str, Any], groups: dict[str, tuple[str, int]]) -> dict[str, dict[str, str]]:
    """For each vendor, the icon's name by code points."""
    names: dict[str, set[str]] = defaultdict(set)
    for points, (name, _) in groups.items():
        names[_plain(name)].add(points)
        names[_plain(name.replace("flag ", "flag-for-", 1))].add(points)
        if "-" not in points:
            names[_plain(unicodedata.name(chr(int(points, 16)), name))].add(points)
    found: dict[str, dict[str, str]] = {}
    for vendor in VENDORS:
        if "chars" in sets[vendor]:
            found[vendor] = _by_code_points(sets[vendor], groups)
            uses = Counter(found[vendor].values())
            for points, icon in found[vendor].items():
                # A drawing shared by several flags names none of them.
                if uses[icon] == 1:
                    names[_plain(icon)].add(points)
    for vendor in VENDORS:
        if vendor not in found:
            found[vendor] = _by_name(sets[vendor], names)
    return found


def draw(svg: str, size: int = SIZE) -> bytes:
    """An SVG as an RGB PNG of `size` x `size` pixels on white."""
    # Without the machine's fonts: no icon holds text, and the result must not depend on them.
    raw = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=DRAWN_SIZE, height=DRAWN_SIZE, skip_system_fonts=True))
    with Image.open(BytesIO(raw)) as drawn:
        layer = drawn.convert("RGBA")
    canvas = Image.new("RGBA", layer.size, "white")
    canvas.alpha_composite(layer)
    small = canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    steps = LEVELS - 1
    levels = [round(value * steps / 255) * 255 // steps for value in range(256)]
    out = BytesIO()
    small.point(levels * 3).save(out, format="PNG", optimize=True)
    return out.getvalue()


def draw_all(sets: dict[str, Any], groups: dict[str, tuple[str, int]]) -> list[Drawing]:
    """Every vendor's emoji, drawn; in order of vendor and code points."""
    icons = find_icons(sets, groups)
    return [
        Drawing(vendor, points, groups[points][1], draw(_svg(sets[vendor], icons[vendor][points])))
        for vendor in VENDORS
        for points in sorted(icons[vendor])
    ]


def split(drawings: list[Drawing]) -> tuple[list[Drawing], list[Drawing]]:
    """Training and test rows: by unit of emoji, capped a class, no drawing twice."""
    units = _units(drawings)
    members: dict[int, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for drawing in drawings:
        members[drawing.label][units[drawing.emoji]].add(drawing.emoji)
    train: set[str] = set()
    test: set[str] = set()
    for label in sorted(members):
        emoji_count = sum(len(unit) for unit in members[label].values())
        wanted = min(TEST_PER_CLASS, round(TEST_SHARE * emoji_count))
        for unit in sorted(members[label], key=_hash):
            # A whole unit goes to one side; of a large one only as many as there is room for.
            room_test = wanted - sum(e in test for u in members[label].values() for e in u)
            room_train = TRAIN_PER_CLASS - sum(e in train for u in members[label].values() for e in u)
            side, room = (test, room_test) if room_test > 0 else (train, room_train)
            side.update(sorted(members[label][unit], key=_hash)[: max(room, 0)])
    seen: set[tuple[str, bytes]] = set()
    rows: tuple[list[Drawing], list[Drawing]] = ([], [])
    for drawing in drawings:
        if (drawing.vendor, drawing.png) not in seen and drawing.emoji in train | test:
            seen.add((drawing.vendor, drawing.png))
            rows[drawing.emoji in test].append(drawing)
    return rows


def write(rows: list[Drawing], path: Path) -> None:
    """Writes `rows` in the Hugging Face image layout, in an order that tells nothing of class or vendor."""
    rows = sorted(rows, key=lambda row: _hash(f"{row.vendor}/{row.emoji}"))
    features = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": list(NAMES)},
        "vendor": {"_type": "Value", "dtype": "string"},
        "emoji": {"_type": "Value", "dtype": "string"},
    }
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("image", image), ("label", pa.int64()), ("vendor", pa.string()), ("emoji", pa.string())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    columns = {
        "image": [{"bytes": row.png, "path": f"{number:05d}.png"} for number, row in enumerate(rows)],
        "label": [row.label for row in rows],
        "vendor": [row.vendor for row in rows],
        "emoji": [row.emoji for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable.writing(path) as file:
        pq.write_table(pa.table(columns, schema=schema), file, compression="zstd", row_group_size=512)


def report(rows: list[Drawing], title: str) -> None:
    """Print rows by vendor and class."""
    counts = Counter((row.vendor, row.label) for row in rows)
    print(f"{title:18}" + "".join(f"{name:>11}" for name in NAMES) + f"{'total':>8}")
    for vendor in VENDORS:
        line = [counts[vendor, label] for label in range(len(NAMES))]
        print(f"{vendor:18}" + "".join(f"{number:11}" for number in line) + f"{sum(line):8}")
    print(f"{len({row.emoji for row in rows})} emoji, {len(rows)} drawings\n")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _points(parts: Iterable[str]) -> str:
    return "-".join(part for part in parts if part != _VARIATION)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _by_code_points(icons: dict[str, Any], groups: dict[str, tuple[str, int]]) -> dict[str, str]:
    listed = ((_points(chars.split("-")), icon) for chars, icon in sorted(icons["chars"].items()))
    return {points: icon for points, icon in listed if points in groups}


def _by_name(icons: dict[str, Any], names: dict[str, set[str]]) -> dict[str, str]:
    aliases: dict[str, list[str]] = defaultdict(list)
    for alias, entry in icons.get("aliases", {}).items():
        if set(entry) == {"parent"}:
            aliases[entry["parent"]].append(alias)
    found: dict[str, str] = {}
    for icon in sorted(icons["icons"]):
        own = names.get(_plain(icon), set())
        meant = own or set[str]().union(*(names.get(_plain(a), set()) for a in aliases[icon]))
        if len(meant) == 1:
            found.setdefault(next(iter(meant)), icon)
    return found


def _svg(icons: dict[str, Any], name: str) -> str:
    """The SVG document of an icon; an alias without changes of its own stands for its parent."""
    while name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    box = [icon.get(key, icons.get(key, 0)) for key in ("left", "top", "width", "height")]
    # A drawing that is not square would be stretched: the box grows around its middle instead.
    side = max(box[2], box[3])
    left, top = box[0] - (side - box[2]) / 2, box[1] - (side - box[3]) / 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {side} {side}">{icon["body"]}</svg>'
    )


def _family(points: str) -> str:
    """Key that an emoji shares with its variants in gender and direction."""
    parts = [part for part in points.split("-") if part not in _GENDERS | {"200d", "27a1"}]
    if any(int(part, 16) in _CLOCKS for part in parts):
        return "clock"
    return "-".join("1f9d1" if part in _PERSONS else part for part in parts)


def _units(drawings: list[Drawing]) -> dict[str, str]:
    """The unit of each emoji: its family, joined with those that a vendor draws identically."""
    leader: dict[str, str] = {}

    def top(unit: str) -> str:
        while leader.get(unit, unit) != unit:
            unit = leader[unit]
        return unit

    first: dict[tuple[str, bytes], str] = {}
    for drawing in drawings:
        mine = top(_family(drawing.emoji))
        other = top(first.setdefault((drawing.vendor, drawing.png), mine))
        leader[max(mine, other)] = min(mine, other)
    return {drawing.emoji: top(_family(drawing.emoji)) for drawing in drawings}


def _package(name: str, folder: Path | None, scratch: Path) -> Path:
    """The unpacked npm package: `folder` where given, else fetched into `scratch`."""
    if folder is not None:
        return folder
    command = ["npm", "pack", "--silent", "--pack-destination", str(scratch), name]
    archive = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    target = scratch / archive.removesuffix(".tgz")
    with tarfile.open(scratch / archive) as packed:
        packed.extractall(target, filter="data")
    return target / "package"


def main() -> None:
    """Command line: fetch, draw, split, write, and print what was drawn."""
    parser = argparse.ArgumentParser(description="Draw the demo's data set.")
    here = Path(__file__).parent
    parser.add_argument("--iconify", type=Path, help=f"{ICONIFY}, unpacked")
    parser.add_argument("--unicode", type=Path, help=f"{UNICODE}, unpacked")
    parser.add_argument("--out", type=Path, default=here / "data", help="folder to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="emoji-") as scratch:
        icons = _package(ICONIFY, arguments.iconify, Path(scratch))
        groups = emoji_groups(_package(UNICODE, arguments.unicode, Path(scratch)))
        sets = {
            vendor: json.loads((icons / "json" / f"{vendor}.json").read_text(encoding="utf-8")) for vendor in VENDORS
        }
    train, test = split(draw_all(sets, groups))
    for name, rows in (("train", train), ("test", test)):
        write(rows, arguments.out / f"{name}.parquet")
        report(rows, name)


if __name__ == "__main__":
    main()
