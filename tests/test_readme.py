"""README names every room, its links lead somewhere, and no file has outgrown its size."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_room_is_in_the_table():
    table = README.split("## Where things are")[1].split("\n## ")[0]
    rooms = [path.stem for path in sorted((ROOT / "malaysian_sft").glob("*.py")) if path.stem != "__init__"]
    assert [room for room in rooms if table.count(f"`{room}`") != 1] == []


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text()
        for link in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", text):
            assert not link or (page.parent / link).exists(), f"{page.name}: {link}"


def test_sizes():
    lines = {
        path: len(path.read_text().splitlines()) for path in [*ROOT.glob("*.py"), *ROOT.glob("malaysian_sft/*.py")]
    }
    most = {path: 500 if path.parent.name == "malaysian_sft" else 600 for path in lines}
    assert [path.name for path in lines if lines[path] > most[path]] == []
    assert len(README.splitlines()) <= 250
