"""Export of a tokenizer as ``tokenizer.json``, for AutoTokenizer and the `tokenizers` package (extra: hf): same ids.

The pieces of a SentencePiece model are written with spaces instead of U+2581, so that U+2581 is a character like any
other and is encoded as its bytes, as in training. Each text gets the begin mark in front, as each sample in training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from moetrain.data.tokenizer_base import SAMPLE_TEXTS, SPACE_SYMBOL, Tokenizer
from moetrain.data.tokenizer_sentencepiece import SentencePieceTokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, longest: int) -> list[str]:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``; return notes on texts whose ids will differ.

    Args:
        longest: longest sample that the model was trained on, in tokens.

    Raises:
        ValueError: the `tokenizers` package is missing, or cannot express this tokenizer; the message is one line.
    """
    built = as_tokenizers(tokenizer)
    begin, end = (built.id_to_token(mark) for mark in (tokenizer.begin_id, tokenizer.end_id))
    notes = _compare(tokenizer, built)
    built.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": end,
        "pad_token": end,
        "add_bos_token": True,  # as tokenizer.json says: for programs that read only this file
        "add_eos_token": False,
        "model_max_length": longest,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a mark within a text is plain text
    }
    if isinstance(tokenizer, SentencePieceTokenizer):
        config["unk_token"] = built.model.unk_token
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return notes


def as_tokenizers(tokenizer: Tokenizer) -> Any:
    """The tokenizer as a ``tokenizers.Tokenizer`` with the same ids, which puts the begin mark before each text.

    Raises:
        ValueError: as `write_tokenizer`.
    """
    try:
        import tokenizers
    except ImportError:
        raise ValueError("the tokenizers package is missing: pip install 'moetrain[hf]'") from None
    if isinstance(tokenizer, SentencePieceTokenizer):
        built = _from_sentencepiece(tokenizer.model)
    else:
        built = tokenizers.Tokenizer.from_str(tokenizer.model.decode("utf-8"))
        built.no_truncation()
        built.no_padding()
    begin = built.id_to_token(tokenizer.begin_id)
    built.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{begin}:0 $A:0", pair=f"{begin}:0 $A:0 $B:0", special_tokens=[(begin, tokenizer.begin_id)]
    )
    built.encode_special_tokens = True
    return built


def _from_sentencepiece(model: bytes) -> Any:
    import tokenizers
    from tokenizers import decoders, models

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    if proto.trainer_spec.model_type != sentencepiece_model_pb2.TrainerSpec.BPE:
        raise ValueError("tokenizer.model is not a BPE model: only BPE models have the same ids in a tokenizer.json")
    vocabulary: dict[str, int] = {}
    scores: dict[str, float] = {}
    marks, atoms, unknown = [], [], "<unk>"
    for number, piece in enumerate(proto.pieces):
        if piece.type == kinds.UNUSED or " " in piece.piece:
            raise ValueError(
                f"tokenizer.model has a piece that no text reaches ({piece.piece!r}): it cannot be exported"
            )
        spelled = piece.piece.replace(SPACE_SYMBOL, " ")
        vocabulary[spelled] = number
        if piece.type == kinds.NORMAL:
            scores[spelled] = piece.score
        elif piece.type == kinds.USER_DEFINED:
            atoms.append(tokenizers.AddedToken(spelled, special=False, normalized=False))
        elif piece.type in (kinds.CONTROL, kinds.UNKNOWN):
            marks.append(tokenizers.AddedToken(spelled, special=True, normalized=False))
            unknown = spelled if piece.type == kinds.UNKNOWN else unknown
    merges = _merges(scores)
    built = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, byte_fallback=True))
    built.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    built.add_special_tokens(marks)
    built.add_tokens(atoms)
    return built


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs in merge order: SentencePiece always merges the two neighbours that make the piece of highest score."""
    made = sorted((piece for piece in scores if len(piece) > 1), key=lambda piece: -scores[piece])
    lonely = next((c for piece in made for c in piece if c not in scores), None)
    if lonely is not None:
        raise ValueError(f"tokenizer.model has pieces with {lonely!r} but none for it alone: it cannot be exported")
    if len({scores[piece] for piece in made}) < len(made):
        raise ValueError("tokenizer.model has pieces of equal score, whose order a tokenizer.json cannot express")
    return [
        (piece[:cut], piece[cut:])
        for piece in made
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def _compare(tokenizer: Tokenizer, built: Any) -> list[str]:
    """Encode sample texts both ways and return a note if only texts with U+2581 get different ids.

    Raises:
        ValueError: a text without U+2581 gets different ids.
    """
    different = [
        text for text in SAMPLE_TEXTS if built.encode(text, add_special_tokens=False).ids != tokenizer.encode(text)
    ]
    plain = [text for text in different if SPACE_SYMBOL not in text]
    if plain:
        raise ValueError(f"a tokenizer.json cannot give this tokenizer's ids: those of {plain[0]!r} differ")
    note = "texts with U+2581 itself have different ids through AutoTokenizer, which reads it as a space"
    return [note] if different else []
