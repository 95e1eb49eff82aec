"""SentencePiece models as the pieces they hold: read from a file, written to one, and put to use."""

from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyrefly: ignore  made by protobuf at import

from orchestrator.errors import ModelError

SPACE = "▁"
"""What SentencePiece writes for a space."""

Piece = ModelProto.SentencePiece
NORMAL, CONTROL, USER_DEFINED = Piece.NORMAL, Piece.CONTROL, Piece.USER_DEFINED
BPE = 2
"""trainer_spec.model_type of a byte-pair encoding."""


def read_model(path: Path) -> ModelProto:
    """The model in a file; ModelError when there is none, or it is not SentencePiece's."""
    if not path.is_file():
        raise ModelError(f"{path} is no file; give a SentencePiece model")
    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ModelError(f"{path} is not a SentencePiece model ({error})") from error
    # Other files, such as tiktoken's, may pass for a message of fields that are unknown here.
    if not model.pieces:
        raise ModelError(f"{path} is not a SentencePiece model (it holds no pieces)")
    return model


def copy_of(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def add_piece(model: ModelProto, piece: str, score: float, kind: int = NORMAL) -> None:
    added = model.pieces.add()
    added.piece = piece
    added.score = score
    # A piece that spells out the default type serializes to other bytes; the published files leave it out.
    if kind != NORMAL:
        added.type = kind


def processor(model: ModelProto) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_proto=model.SerializeToString())


def piece_processor(model: ModelProto) -> SentencePieceProcessor:
    """Encodes a piece's own characters, as they stand within a text: no dummy prefix, nothing normalized away."""
    bare = copy_of(model)
    bare.normalizer_spec.Clear()
    bare.normalizer_spec.add_dummy_prefix = False
    bare.normalizer_spec.remove_extra_whitespaces = False
    return processor(bare)
