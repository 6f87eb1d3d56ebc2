"""The picture of the blocks in the README, dark and light: `python -m tools.architecture docs`.

Plain SVG; boxes are placed by hand, in pixels.
"""

from __future__ import annotations

import sys
from pathlib import Path

LIGHT = """
text { font: 13px -apple-system, "Segoe UI", sans-serif; fill: #1f2328; text-anchor: middle }
.title { font-weight: 600 } .small { font-size: 11px; fill: #59636e }
rect { fill: #f6f8fa; stroke: #818b98; rx: 5 } .frame { fill: none; stroke-dasharray: 4 3 }
.kda { fill: #ddf4ff; stroke: #0969da } .mla { fill: #fff1e5; stroke: #bc4c00 }
.moe { fill: #dafbe1; stroke: #1a7f37 }
path { fill: none; stroke: #59636e; stroke-width: 1.3 } .head { fill: #59636e; stroke: none }
"""
DARK = f"""{LIGHT}
text {{ fill: #f0f6fc }} .small {{ fill: #9198a1 }} rect {{ fill: #212830; stroke: #656c76 }}
.frame {{ fill: none }} .kda {{ fill: #0c2d6b; stroke: #4493f8 }}
.mla {{ fill: #5a1e02; stroke: #db6d28 }} .moe {{ fill: #04260f; stroke: #3fb950 }}
path {{ stroke: #9198a1 }} .head {{ fill: #9198a1 }}
"""


class Drawing:
    def __init__(self, width: int, height: int) -> None:
        self.width, self.height, self.parts = width, height, []

    def box(self, x: int, y: int, w: int, text: str, kind: str = "", h: int = 26) -> None:
        """A box whose middle is at x, with its text."""
        self.parts.append(
            f'<rect class="{kind}" x="{x - w // 2}" y="{y}" width="{w}" height="{h}"/>'
        )
        self.text(x, y + h // 2 + 5, text)

    def text(self, x: int, y: int, text: str, kind: str = "") -> None:
        self.parts.append(f'<text class="{kind}" x="{x}" y="{y}">{text}</text>')

    def frame(self, x: int, y: int, w: int, h: int, title: str) -> None:
        self.parts.append(f'<rect class="frame" x="{x}" y="{y}" width="{w}" height="{h}"/>')
        self.text(x + w // 2, y - 8, title, "title")

    def arrow(self, *points: tuple[int, int]) -> None:
        """A line through the points with a head at the last, which points up or to the right."""
        line = " L ".join(f"{x} {y}" for x, y in points)
        self.parts.append(f'<path d="M {line}"/>')
        (x, y), (bx, _) = points[-1], points[-2]
        head = f"{x} {y} l -4 7 h 8" if bx == x else f"{x} {y} l -7 -4 v 8"
        self.parts.append(f'<path class="head" d="M {head} z"/>')

    def svg(self, style: str) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}">'
            f"<style>{style}</style>{''.join(self.parts)}</svg>\n"
        )


def stack(d: Drawing) -> None:
    """The whole model, from the bottom up: three blocks of KDA, then one of MLA."""
    d.text(140, 24, "Kimi Linear: 27 blocks", "title")
    d.box(140, 40, 150, "norm, lm_head")
    rows = [("MLA + MoE", "mla"), *[("KDA + MoE", "kda")] * 3]
    for i, (name, kind) in enumerate(rows):
        d.box(140, 96 + 44 * i, 150, name, kind)
        d.arrow((140, 96 + 44 * i), (140, 70 if i == 0 else 80 + 44 * (i - 1) + 43))
    d.parts.append('<rect class="frame" x="48" y="84" width="184" height="182"/>')
    d.text(140, 284, "every fourth block is MLA", "small")
    d.box(140, 312, 150, "embedding")
    d.arrow((140, 312), (140, 290))
    d.arrow((140, 266), (140, 256))


def block(d: Drawing) -> None:
    """A block: norms before, residual additions behind."""
    d.frame(285, 40, 190, 298, "a block")
    for y, name, kind in ((70, "MoE", "moe"), (196, "KDA or MLA", "kda")):
        d.box(395, y - 6, 30, "+")
        d.box(395, y + 38, 120, name, kind)
        d.box(395, y + 80, 120, "RMSNorm")
        d.arrow((395, y + 38), (395, y + 21))
        d.arrow((395, y + 80), (395, y + 65))
        d.arrow((395, y + 119), (395, y + 107))
        d.arrow((395, y + 116), (312, y + 116), (312, y + 7), (379, y + 7))
    d.text(340, 331, "residual", "small")
    d.arrow((395, 64), (395, 46))


def kda(d: Drawing) -> None:
    """Four projected paths into the delta rule, and the output gate."""
    d.frame(515, 40, 260, 298, "KDA")
    d.box(645, 52, 150, "output projection", "kda")
    d.box(645, 96, 230, "gated norm  (output gate)")
    d.box(645, 140, 230, "delta rule: one state per head", "kda")
    for x, name in ((545, "q"), (605, "k"), (665, "v")):
        d.box(x, 206, 50, "conv")
        d.box(x, 254, 50, name)
        d.arrow((x, 206), (x, 167))
        d.arrow((x, 254), (x, 233))
        d.arrow((x, 300), (x, 281))
    d.box(736, 230, 70, "decay, β")
    d.arrow((736, 230), (736, 167))
    d.arrow((736, 300), (736, 257))
    d.arrow((645, 140), (645, 123))
    d.arrow((645, 96), (645, 79))
    d.text(645, 318, "four projected paths of the normed input", "small")


def moe(d: Drawing) -> None:
    """Router, routed experts and the shared one."""
    d.frame(815, 40, 250, 298, "MoE")
    d.box(940, 56, 190, "weighted sum", "moe")
    for i, name in enumerate(("1", "2", "…", "256")):
        d.box(848 + 46 * i, 140, 38, name)
        if name != "…":
            d.arrow((848 + 46 * i, 140), (848 + 46 * i, 83))
    d.text(912, 184, "routed experts, 8 of 256", "small")
    d.box(1035, 140, 50, "shared")
    d.arrow((1035, 140), (1035, 83))
    d.box(912, 216, 150, "router (sigmoid)")
    d.arrow((912, 216), (912, 192))
    d.arrow((912, 290), (912, 243))
    d.arrow((912, 270), (1035, 270), (1035, 167))
    d.text(912, 308, "normed input", "small")


def main() -> None:
    drawing = Drawing(1090, 356)
    for part in (stack, block, kda, moe):
        part(drawing)
    for shade, style in (("dark", DARK), ("light", LIGHT)):
        file = Path(sys.argv[1]) / f"architecture_{shade}.svg"
        file.write_text(drawing.svg(style), encoding="utf-8")


if __name__ == "__main__":
    main()
