"""Text to pretrain on: files, tokenizers, token files, and a loader whose position can be saved."""

from .corpus import DataError, find_documents
from .loader import Batches
from .tokenizer import Tokenizer
from .tokens import TokenFiles, prepare

__all__ = ["Batches", "DataError", "TokenFiles", "Tokenizer", "find_documents", "prepare"]
