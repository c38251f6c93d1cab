"""Things that one could take for one another when they are small: never in one picture, never asked about."""

from fastvlm.synth.shapes import SHAPES

LOOKALIKES = (
    frozenset({"apple", "tomato", "cherry", "peach", "orange", "strawberry", "ladybug"}),
    frozenset({"orange", "peach", "lemon", "pear", "sun"}),
    frozenset({"circle", "ball", "clock", "cookie", "donut", "orange", "egg", "apple", "balloon", "moon", "sun"}),
    frozenset({"flower", "sunflower", "clover", "leaf", "tulip", "rose", "sun"}),
    frozenset({"car", "bus", "truck", "train", "tractor"}),
    frozenset({"dog", "cat", "rabbit", "pig", "bear", "cow", "lion", "tiger", "panda", "monkey", "horse"}),
    frozenset({"bird", "duck", "penguin", "owl", "chicken"}),
    frozenset({"airplane", "rocket", "helicopter"}),
    frozenset({"banana", "moon"}),
    frozenset({"bee", "butterfly", "ladybug"}),
    frozenset({"carrot", "pencil"}),
    frozenset({"tree", "cactus", "broccoli", "palm tree"}),
    frozenset({"snail", "turtle"}),
    frozenset({"fish", "whale"}),
    frozenset({"cloud", "snowman"}),
    frozenset({"bell", "light bulb"}),
    frozenset({"book", "rectangle", "square", "phone", "gift", "door"}),
    frozenset({"star", "leaf", "snowflake"}),
    frozenset({"heart", "balloon"}),
    frozenset({"cake", "pizza", "cheese", "triangle", "hamburger"}),
    frozenset({"house", "door"}),
)


def are_rivals(first: str, second: str) -> bool:
    """Whether the two could be mixed up."""
    if first == second or any(first in group and second in group for group in LOOKALIKES):
        return True
    return any(
        (shape.name == first and second in shape.rivals) or (shape.name == second and first in shape.rivals)
        for shape in SHAPES
    )
