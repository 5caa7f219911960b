"""Questions packed behind one image, and scenes as symbols.

Many questions share one image: each is a *block* of text that sees the image and itself only. Axes: S scenes, P prefix
tokens (bos, roles, image), V vision tokens, T text tokens, D hidden.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_hidrop.lab.train.questions import COLUMN_NAMES, ROW_NAMES, Question, grid_cell
from vllm_hidrop.lab.train.scenes import NUM_PATCHES, PATCH_SIDE, PATCHES_PER_SIDE, Scene, Thing
from vllm_hidrop.lab.train.tower import normalised_centre
from vllm_hidrop.lab.train.vocabulary import ASSISTANT, EOS, PAD, TOKEN_IDS, UNK, USER

IGNORED = -100
SECOND_TURN_FRACTION = 0.15
NO_QUESTION_MARK_FRACTION = 0.15
MAX_PATCHES_PER_THING = 9
NUM_CODE_WORDS = 5


@dataclass(frozen=True)
class TextBatch:
    """Packed questions, every tensor [S, T].

    ``offsets`` count from the end of the image; ``targets`` is the next token where an answer is learnt, else
    ``IGNORED``. ``blocks`` and ``owners`` (a target's question, as an index into ``types``) are -1 elsewhere.
    """

    ids: Tensor
    offsets: Tensor
    blocks: Tensor
    targets: Tensor
    owners: Tensor
    types: list[str]


def _turn(question: Question, rng: np.random.Generator) -> tuple[list[int], int]:
    """Token ids of one turn and how many of them are the answer, its EOS included."""
    words = question.text.split()
    if rng.random() < NO_QUESTION_MARK_FRACTION:
        words = words[:-1]
    answer = [*question.answer.split(), EOS]
    return [TOKEN_IDS[word] for word in (*words, ASSISTANT, *answer)], len(answer)


@dataclass
class _Row:
    """One scene's row while it is packed: (id, offset, block, target, owner) of every column."""

    columns: list[tuple[int, int, int, int, int]]

    def add(self, block: int, owner: int, question: Question, rng: np.random.Generator) -> None:
        """Append one turn to ``block``; a later turn starts with the user marker."""
        ids, num_answer = _turn(question, rng)
        offset = sum(column[2] == block for column in self.columns)
        if offset:
            ids = [TOKEN_IDS[USER], *ids]
        first_asked = len(ids) - num_answer - 1
        for index, token in enumerate(ids):
            asked = first_asked <= index < len(ids) - 1
            target = ids[index + 1] if asked else IGNORED
            self.columns.append((token, offset + index, block, target, owner if asked else -1))


def pack_questions(
    per_scene: list[list[Question]],
    rng: np.random.Generator,
    second_turn_fraction: float = SECOND_TURN_FRACTION,
) -> TextBatch:
    """Pack the questions of each scene; a share of them becomes the second turn of the block before."""
    rows = []
    types: list[str] = []
    for questions in per_scene:
        row, block, turns = _Row([]), -1, 2
        for question in questions:
            if turns == 1 and rng.random() < second_turn_fraction:
                turns = 2
            else:
                block, turns = block + 1, 1
            row.add(block, len(types), question, rng)
            types.append(question.type)
        rows.append(row.columns)
    width = max(len(columns) for columns in rows)
    padding = (TOKEN_IDS[PAD], 0, -1, IGNORED, -1)
    packed = [columns + [padding] * (width - len(columns)) for columns in rows]
    ids, offsets, blocks, targets, owners = torch.tensor(packed).unbind(-1)
    return TextBatch(ids, offsets, blocks, targets, owners, types)


def exact_matches(batch: TextBatch, predicted: Tensor) -> dict[str, list[bool]]:
    """By question type, whether every token of each answer is right; ``predicted`` is [S, T].

    Teacher forcing makes this the same as greedy decoding.
    """
    asked = batch.owners >= 0
    is_right = torch.ones(len(batch.types), dtype=torch.bool)
    wrong = asked & (predicted != batch.targets)
    is_right[batch.owners[wrong]] = False
    matches: dict[str, list[bool]] = {}
    for name, right in zip(batch.types, is_right.tolist(), strict=True):
        matches.setdefault(name, []).append(right)
    return matches


@dataclass(frozen=True)
class SymbolBatch:
    """Scenes as symbols: ``centres`` [S, V, 2], ``is_background`` [S, V], ``patches`` [S, V] ascending patch indices.

    ``words`` [S, V, NUM_CODE_WORDS] are token ids, ``PAD`` for none.
    """

    words: Tensor
    centres: Tensor
    is_background: Tensor
    patches: Tensor


def thing_words(thing: Thing) -> list[int]:
    """Token ids whose embeddings, summed, stand for a thing."""
    row, column = grid_cell(thing)
    names = ("text" if thing.is_word else thing.kind, thing.colour, ROW_NAMES[row])
    return [TOKEN_IDS[name] for name in (*names, COLUMN_NAMES[column], thing.text or PAD)]


def symbol_table(scene: Scene) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Words [N + 1, NUM_CODE_WORDS] and normalised centre [N + 1, 2] of N things; the last row is background."""
    background = [TOKEN_IDS[PAD]] * NUM_CODE_WORDS
    words = [thing_words(thing) for thing in scene.things]
    centres = [normalised_centre(thing.centre) for thing in scene.things]
    return np.array([*words, background]), np.array([*centres, (0.0, 0.0)], np.float32)


def _patches_of(thing: Thing) -> list[int]:
    last_row = (thing.top + thing.height - 1) // PATCH_SIDE
    last_column = (thing.left + thing.width - 1) // PATCH_SIDE
    rows = range(thing.top // PATCH_SIDE, last_row + 1)
    columns = range(thing.left // PATCH_SIDE, last_column + 1)
    return [row * PATCHES_PER_SIDE + column for row in rows for column in columns]


def draw_patches(scene: Scene, num_tokens: int, rng: np.random.Generator) -> dict[int, int]:
    """``num_tokens`` patches, at least one per thing, and the index of the thing each shows (N of N: background)."""
    most = min(MAX_PATCHES_PER_THING, (num_tokens - 1) // len(scene.things))
    owners: dict[int, int] = {}
    covered: set[int] = set()
    for index, thing in enumerate(scene.things):
        patches = _patches_of(thing)
        covered.update(patches)
        number = int(rng.integers(1, most + 1))
        for at in rng.permutation(len(patches))[:number]:
            owners[patches[at]] = index
    for patch in rng.permutation(NUM_PATCHES):
        if len(owners) == num_tokens:
            break
        if int(patch) not in covered:
            owners[int(patch)] = len(scene.things)
    return owners


def make_symbols(scenes: list[Scene], num_tokens: int, rng: np.random.Generator) -> SymbolBatch:
    """Each scene as ``num_tokens`` symbolic vision tokens at true patch positions."""
    words, centres, is_background, patches = [], [], [], []
    for scene in scenes:
        owners = draw_patches(scene, num_tokens, rng)
        order = sorted(owners)
        rows = np.array([owners[patch] for patch in order])
        scene_words, scene_centres = symbol_table(scene)
        words.append(scene_words[rows])
        centres.append(scene_centres[rows])
        is_background.append(rows == len(scene.things))
        patches.append(order)
    return SymbolBatch(
        torch.from_numpy(np.stack(words)),
        torch.from_numpy(np.stack(centres)),
        torch.from_numpy(np.stack(is_background)),
        torch.tensor(patches),
    )


def random_words(num_words: int, rng: np.random.Generator) -> list[int]:
    """Ids of random words that stand for a system message; about every second one is unknown."""
    known = rng.integers(TOKEN_IDS[UNK], len(TOKEN_IDS), num_words)
    is_unknown = rng.random(num_words) < 0.5
    return [TOKEN_IDS[UNK] if unknown else int(word) for word, unknown in zip(known, is_unknown, strict=True)]
