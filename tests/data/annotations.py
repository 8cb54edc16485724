"""What tests of conversions share."""

from hypothesis import strategies as st

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "cat", "<box>"]),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=5,
)


class Named:
    """Pictures that nobody has: names stay names, and some have a size."""

    def __init__(self, **sizes):
        self.sizes = sizes

    def source(self, name):
        return name

    def size(self, name):
        return self.sizes.get(name)


def said(record):
    """What the turns of a record say, in order."""
    return [turn["value"] for turn in record["conversations"]]


def counts(tallies):
    """How often, by reason."""
    return {what: tally.count for what, tally in tallies.items()}
