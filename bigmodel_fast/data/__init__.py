"""What models learn from: text (files, tokenizers, token files), images and other arrays, and loaders of batches."""

from .arrays import ArrayLoader, Augment
from .corpus import DataError, find_documents
from .images import ImageLoader, Images, read_idx
from .loader import Batches
from .tokenizer import Tokenizer
from .tokens import TokenFiles, prepare

__all__ = [
    "ArrayLoader",
    "Augment",
    "Batches",
    "DataError",
    "ImageLoader",
    "Images",
    "TokenFiles",
    "Tokenizer",
    "find_documents",
    "prepare",
    "read_idx",
]
