"""Fetch the pinned fonts, emoji and words, and make the folder that `fastvlm.synth.assets` reads.

Every archive comes through `npm pack` and is compared with the sha256 in `synth/assets.json` before anything in it is
read. Emoji that are vector drawings are rendered by resvg, compiled to WebAssembly, in the Node that runs npm.
"""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvlm.checkpoint.folder import find_stranger, replace_folder
from fastvlm.errors import DownloadError, InputError
from fastvlm.synth.assets import MANIFEST, is_complete, lock_digest, read_lock
from fastvlm.synth.kinds import KINDS

SPRITE_SIDE = 128
"""Longest side of a sprite; drawings that are smaller than this are never enlarged."""
RENDER_SIDE = 256
MIN_OPAQUE = 0.05
"""A sprite with less of its box visible than this is taken for blank."""
TIMEOUT = 300.0
MAX_MEMBER_BYTES = 64 * 1024 * 1024
WORD_BANDS = ("10", "20", "35")
WORD_DIALECTS = ("english", "american")
SUFFIXES = ("s", "es", "ed", "d", "ing", "er", "ers", "r", "rs", "y", "ly", "est")
LOCK = Path(str(resources.files("fastvlm.synth").joinpath("assets.json")))
_WRITTEN = frozenset({MANIFEST, "fonts", "emoji.npz", "words.txt"})
RENDER_SCRIPT = """
const fs = require("fs");
const [library, wasm, jobs, out, side] = process.argv.slice(2);
const { initWasm, Resvg } = require(library);
initWasm(fs.readFileSync(wasm)).then(() => {
  JSON.parse(fs.readFileSync(jobs, "utf8")).forEach((svg, i) => {
    const image = new Resvg(svg, { fitTo: { mode: "width", value: Number(side) } }).render();
    fs.writeFileSync(`${out}/${i}.png`, image.asPng());
  });
}).catch((error) => { console.error(String(error)); process.exit(1); });
"""

Progress = Callable[[str], None]


def fetch_assets(folder: Path, *, progress: Progress | None = None) -> Path:
    """Download, verify and prepare all fonts, emoji and words.

    Args:
        folder: where they go; a complete folder of this version is left as it is, an older one is replaced.
        progress: is called with one short line for each step.

    Returns:
        `folder`.

    Raises:
        DownloadError: npm is missing, a package cannot be fetched, or what came is not what was pinned.
        InputError: `folder` holds something else, or cannot be written.
    """
    say = progress or _silent
    if is_complete(folder):
        say(f"{folder} is complete")
        return folder
    if folder.exists() and not _may_be_replaced(folder):
        raise InputError(f"{folder} holds other files: name an empty or a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fastvlm-assets-") as scratch:
            _build(folder.resolve(), Path(scratch), say)  # a link stays a link
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error}") from error
    say(f"wrote {folder}")
    return folder


def pin(packages: list[dict[str, Any]], *, progress: Progress | None = None) -> dict[str, Any]:
    """Fetch packages and compute what the lock file records of them.

    Args:
        packages: rows of the lock file; `name`, `version`, `license` and `role` are needed, the rest is kept.
        progress: is called with one short line for each package.

    Returns:
        The content of `assets.json`, with `sha256` and `bytes` of each archive as it came.
    """
    with tempfile.TemporaryDirectory(prefix="fastvlm-pin-") as scratch_name:
        bare = [{key: value for key, value in row.items() if key != "sha256"} for row in packages]
        archives = _fetch_all(bare, Path(scratch_name), progress or _silent)
        rows = []
        for row in bare:
            content = archives[row["name"]].read_bytes()
            rows.append(row | {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    return {"packages": sorted(rows, key=lambda row: (row["role"], row["name"]))}


def update_lock(path: Path = LOCK, *, progress: Progress | None = None) -> Path:
    """Compute every sha256 of the lock file at `path` again, write it in place, and return its path.

    Raises:
        DownloadError: npm is missing, or a package cannot be fetched.
        InputError: The file cannot be written.
    """
    lock = pin(json.loads(path.read_text("utf-8"))["packages"], progress=progress)
    lines = ",\n".join("  " + json.dumps(row, sort_keys=True) for row in lock["packages"])
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(f'{{"packages": [\n{lines}\n]}}\n', "utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from error
    return path


def _silent(_: str) -> None:
    """Drop a progress line."""


def _may_be_replaced(folder: Path) -> bool:
    """Say whether a folder is empty or was written by an earlier `fetch_assets`."""
    if not folder.is_dir():
        return False
    return find_stranger(folder, marks=(MANIFEST,), is_known=lambda path: path.name in _WRITTEN) is None


def _build(folder: Path, scratch: Path, say: Progress) -> None:
    """Fetch everything into `scratch`, make the folder next to where it belongs, and move it there."""
    packages = read_lock()["packages"]
    archives = _fetch_all(packages, scratch, say)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        say("drawing the emoji")
        _make_folder(packages, archives, made, scratch)
        replace_folder(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _fetch_all(packages: list[dict[str, Any]], scratch: Path, say: Progress) -> dict[str, Path]:
    """Fetch the archives, four at a time: package name -> verified file."""
    npm = shutil.which("npm")
    if npm is None:
        raise DownloadError("npm is not installed: install Node.js, which brings npm, and run the command again")
    with ThreadPoolExecutor(max_workers=4) as pool:
        jobs = [(row, pool.submit(_fetch, npm, row, scratch)) for row in packages]
        try:
            archives = {}
            for index, (row, job) in enumerate(jobs, 1):
                archives[row["name"]] = job.result()
                say(f"{index}/{len(jobs)} {row['name']} {row['version']}")
        except DownloadError:
            pool.shutdown(cancel_futures=True)
            raise
    return archives


def _fetch(npm: str, row: dict[str, Any], scratch: Path) -> Path:
    """Fetch one archive with `npm pack` and compare its sha256, if the row has one."""
    wanted = f"{row['name']}@{row['version']}"
    with tempfile.TemporaryDirectory(dir=scratch) as empty:
        command = [npm, "pack", wanted, "--silent", "--ignore-scripts"]
        try:
            done = subprocess.run(command, cwd=empty, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            raise DownloadError(f"`npm pack {wanted}` took more than {TIMEOUT:.0f} s: check the network") from None
        except OSError as error:
            raise DownloadError(f"`npm pack {wanted}` cannot be run: {error}") from error
        found = sorted(Path(empty).glob("*.tgz"))
        if done.returncode != 0 or len(found) != 1:
            reasons = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit {done.returncode}"]
            raise DownloadError(f"`npm pack {wanted}` failed ({reasons[0].strip()}): check the network")
        content = found[0].read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest != row.get("sha256", digest):
            raise DownloadError(f"{wanted} has sha256 {digest}, expected {row['sha256']}: it is not what was pinned")
        target = scratch / (re.sub(r"[^a-z0-9.-]", "_", wanted) + ".tgz")
        os.replace(found[0], target)
    return target


def _read_members(archive: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Read the named files of an npm archive into memory; nothing is ever written under a name from inside it."""
    wanted = {f"package/{name}": name for name in names}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if member.name not in wanted:
                    continue
                stream = tar.extractfile(member) if member.isreg() else None
                if stream is None or member.size > MAX_MEMBER_BYTES:
                    raise DownloadError(f"{archive.name}: {member.name} is not a plain file of a sensible size")
                found[wanted[member.name]] = stream.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DownloadError(f"{archive.name} cannot be read: {error}") from error
    if missing := sorted(set(wanted.values()) - set(found)):
        raise DownloadError(f"{archive.name} lacks {missing[0]}")
    return found


def _make_folder(packages: list[dict[str, Any]], archives: dict[str, Path], folder: Path, scratch: Path) -> None:
    """Write fonts, sprites, words, and the manifest last."""
    by_role: dict[str, list[dict[str, Any]]] = {}
    for row in packages:
        by_role.setdefault(row["role"], []).append(row)
    (folder / "fonts").mkdir()
    fonts = []
    for row in by_role["font"]:
        name = row["file"].rpartition("/")[2]
        (folder / "fonts" / name).write_bytes(_read_members(archives[row["name"]], [row["file"]])[row["file"]])
        marks = {"is_heldout": row.get("heldout", False), "is_caps_only": row.get("caps_only", False)}
        fonts.append({"family": row["family"], "file": name} | marks)
    words = _words(by_role["words"], by_role["blocklist"], archives)
    (folder / "words.txt").write_text("\n".join(words) + "\n", "utf-8")
    sprites = _sprites(by_role["emoji"], by_role["renderer"], archives, scratch)
    np.savez_compressed(folder / "emoji.npz", pixels=np.concatenate([sprite.ravel() for *_, sprite in sprites]))
    rows = [
        {"kind": kind, "design": design, "height": sprite.shape[0], "width": sprite.shape[1]}
        for kind, design, sprite in sprites
    ]
    credits_ = [{key: row[key] for key in ("name", "version", "license", "author")} for row in packages]
    manifest = {"digest": lock_digest(), "fonts": fonts, "sprites": rows, "credits": credits_}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")


def _words(lists: list[dict[str, Any]], blocklists: list[dict[str, Any]], archives: dict[str, Path]) -> list[str]:
    """Return the everyday words, commonest band first, without offensive ones and their inflections."""
    blocked: set[str] = set()
    for row in blocklists:
        text = _read_members(archives[row["name"]], [row["file"]])[row["file"]].decode("utf-8")
        blocked |= set(json.loads(text)) if row["file"].endswith(".json") else _rated_words(text)
    words: dict[str, None] = {}
    for row in lists:
        files = [[f"{dialect}-words-{band}.json" for dialect in WORD_DIALECTS] for band in WORD_BANDS]
        content = _read_members(archives[row["name"]], [name for names in files for name in names])
        for names in files:
            band = sorted({word for name in names for word in json.loads(content[name])})
            words |= dict.fromkeys(word for word in band if re.fullmatch("[ai]|[a-z]{2,14}", word))
    return [word for word in words if blocked.isdisjoint(_stems(word))]


def _rated_words(source: str) -> set[str]:
    """Read `word: rating` lines of a JavaScript table; rating 0 means that the word is rarely meant badly."""
    return {word for word, rating in re.findall(r"^\s+'?([\w ]+)'?: (\d)", source, re.MULTILINE) if rating != "0"}


def _stems(word: str) -> Iterator[str]:
    """Yield a word and what it may be an inflection of."""
    yield word
    for suffix in SUFFIXES:
        if word.endswith(suffix):
            stem = word.removesuffix(suffix)
            yield stem
            yield stem + "e"
            if len(stem) > 2 and stem[-1] == stem[-2]:
                yield stem[:-1]


def _sprites(
    designs: list[dict[str, Any]], renderers: list[dict[str, Any]], archives: dict[str, Path], scratch: Path
) -> list[tuple[str, str, np.ndarray]]:
    """Return (kind, design, sprite `(H, W, 4)`), kind by kind: its own codepoint in every design, then its others."""
    designs = sorted(designs, key=lambda row: row["order"])
    pictures = {row["design"]: _pictures(row, designs[0], archives) for row in designs}
    vectors = {(d, text): svg for d, found in pictures.items() for text, svg in found.items() if svg[:1] == b"<"}
    drawn = dict(zip(vectors, _render(list(vectors.values()), renderers[0], archives, scratch), strict=True))
    sprites = []
    for kind in KINDS:
        for text in (kind.codepoint, *kind.also):
            for row in designs:
                picture = drawn.get((row["design"], text), pictures[row["design"]].get(text))
                if picture is not None:
                    sprites.append((kind.name, row["design"], _sprite(picture, f"{row['design']} {kind.name}")))
    return sprites


def _pictures(row: dict[str, Any], first: dict[str, Any], archives: dict[str, Path]) -> dict[str, bytes]:
    """Return emoji text -> SVG or WebP file of one design; a design may lack some."""
    kinds = [kind for kind in KINDS if kind.name not in row.get("skip", [])]
    texts = [text for kind in kinds for text in (kind.codepoint, *kind.also)]
    archive = archives[row["name"]]
    if "pattern" in row:
        names = {text: row["pattern"].format(_hex(text)) for text in texts}
        content = _read_members(archive, names.values())
        return {text: content[name] for text, name in names.items()}
    # Some designs come without a table of codepoints; they share the names of the first one.
    own = json.loads(_read_members(archive, ["chars.json"])["chars.json"])
    shared = json.loads(_read_members(archives[first["name"]], ["chars.json"])["chars.json"])
    icons = json.loads(_read_members(archive, ["icons.json"])["icons.json"])
    pictures = {}
    for text in texts:
        keys = (_hex(text), _hex(text.replace("\N{VARIATION SELECTOR-16}", "")))
        for name in [table[key] for table in (own, shared) for key in keys if key in table]:
            name = icons.get("aliases", {}).get(name, {}).get("parent", name)
            if name in icons["icons"]:
                pictures[text] = _svg(icons, icons["icons"][name])
                break
    return pictures


def _hex(text: str) -> str:
    """Return the codepoints of an emoji as file names spell them: `2764-fe0f`."""
    return "-".join(f"{ord(character):04x}" for character in text)


def _svg(icons: dict[str, Any], icon: dict[str, Any]) -> bytes:
    """Return one drawing of an icon set as a whole SVG file."""
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'.encode()


def _render(svgs: list[bytes], row: dict[str, Any], archives: dict[str, Path], scratch: Path) -> list[bytes]:
    """Draw SVG files as PNG files, `RENDER_SIDE` wide."""
    node = shutil.which("node")
    if node is None:
        raise DownloadError("node is not installed: install Node.js and run the command again")
    library, wasm = row["files"]
    work = scratch / "render"
    work.mkdir()
    for name, content in _read_members(archives[row["name"]], [library, wasm]).items():
        (work / name).write_bytes(content)
    (work / "render.js").write_text(RENDER_SCRIPT, "utf-8")
    (work / "jobs.json").write_text(json.dumps([svg.decode("utf-8") for svg in svgs]), "utf-8")
    paths = [work / name for name in ("render.js", library, wasm, "jobs.json")]
    command = [node, *map(str, paths), str(work), str(RENDER_SIDE)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (subprocess.TimeoutExpired, OSError) as error:
        raise DownloadError(f"drawing the emoji with node failed: {error}") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        raise DownloadError(f"drawing the emoji with node failed: {last}")
    return [(work / f"{index}.png").read_bytes() for index in range(len(svgs))]


def _sprite(picture: bytes, what: str) -> np.ndarray:
    """Decode, crop to what is visible and shrink: sprite `(H, W, 4)` uint8."""
    with Image.open(io.BytesIO(picture)) as opened:
        image = opened.convert("RGBA")
    # Nearly invisible pixels (soft shadows' ends) would keep the box too large.
    box = image.getchannel("A").point([0] * 16 + [255] * 240).getbbox()
    if box is None:
        raise DownloadError(f"the drawing of {what} is blank: it is not what was pinned")
    image = image.crop(box)
    scale = SPRITE_SIDE / max(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    sprite = np.array(image)
    sprite[sprite[..., 3] == 0] = 0
    if (sprite[..., 3] > 127).mean() < MIN_OPAQUE:
        raise DownloadError(f"the drawing of {what} is blank: it is not what was pinned")
    return sprite
