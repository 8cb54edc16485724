"""How right an answer is: the same words, or boxes that overlap."""

from vltrain.data.grounding import Box, parse_boxes


def is_exact(answer: str, expected: str) -> bool:
    """Whether the answer is the expected one, blanks around it aside."""
    return answer.strip() == expected.strip()


def box_iou(first: Box, second: Box) -> float:
    """Area that two boxes share over the area that they cover together, 0..1.

    0 where neither has an area.
    """
    width = min(first.x2, second.x2) - max(first.x1, second.x1)
    height = min(first.y2, second.y2) - max(first.y1, second.y1)
    shared = max(0, width) * max(0, height)
    covered = _area(first) + _area(second) - shared
    return shared / covered if covered else 0.0


def box_overlaps(answer: str, expected: str) -> list[float]:
    """For each expected box, the IoU of the answer's box that fits it best.

    Returns:
        As many numbers 0..1 as `expected` has boxes; 0 where the answer has no readable box.
    """
    answered, _ = parse_boxes(answer)
    wanted, _ = parse_boxes(expected)
    return [max((box_iou(box, want) for box in answered), default=0.0) for want in wanted]


def _area(box: Box) -> int:
    return (box.x2 - box.x1) * (box.y2 - box.y1)
