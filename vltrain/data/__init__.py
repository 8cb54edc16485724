"""Samples: from the files people have to padded batches. Knows no models."""

from vltrain.data.encoding import Processor, Sample, encode

__all__ = ["Processor", "Sample", "encode"]
