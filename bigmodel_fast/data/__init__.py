"""What models learn from: text (files, tokenizers, token files), tables of examples, images and arrays, and batches."""

from .arrays import ArrayLoader, Augment
from .buckets import Buckets
from .corpus import DataError, find_documents
from .images import ImageLoader, Images, read_idx
from .loader import Batches
from .masking import MaskedBatches, Masking
from .pairs import PairBatches, PairFiles, Pairs, find_pairs, prepare_pairs, read_lines
from .snippets import labelled_snippets
from .tables import Example, Field, find_tables, read_examples
from .tokenizer import Tokenizer
from .tokens import TokenFiles, prepare

__all__ = [
    "ArrayLoader",
    "Augment",
    "Batches",
    "Buckets",
    "DataError",
    "Example",
    "Field",
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
    "find_tables",
    "labelled_snippets",
    "prepare",
    "prepare_pairs",
    "read_examples",
    "read_idx",
    "read_lines",
]
