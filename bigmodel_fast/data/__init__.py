"""What models learn from: text (files, tokenizers, token files), images and other arrays, and loaders of batches."""

from .arrays import ArrayLoader, Augment
from .corpus import DataError, find_documents
from .images import ImageLoader, Images, read_idx
from .loader import Batches
from .masking import MaskedBatches, Masking
from .pairs import PairBatches, PairFiles, Pairs, find_pairs, prepare_pairs, read_lines
from .tokenizer import Tokenizer
from .tokens import TokenFiles, prepare

__all__ = [
    "ArrayLoader",
    "Augment",
    "Batches",
    "DataError",
    "ImageLoader",
    "Images",
    "MaskedBatches",
    "Masking",
    "PairBatches",
    "PairFiles",
    "Pairs",
    "TokenFiles",
    "Tokenizer",
    "find_documents",
    "find_pairs",
    "prepare",
    "prepare_pairs",
    "read_idx",
    "read_lines",
]
