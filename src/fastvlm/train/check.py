"""What `fastvlm data check` finds: samples as the model will see them, and counts of what is right and wrong."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import quantiles

from torch.utils.data import DataLoader, Dataset

from fastvlm.errors import InputError
from fastvlm.prompt import IGNORE, IMAGE_MARK, Tokenizer, Tokens
from fastvlm.train.data import WORKER_TIMEOUT, alive, start_worker
from fastvlm.train.dataset import ConversationDataset

_AT_ONCE = 16
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""What could do something to a terminal."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one sample is."""

    index: int
    source: str
    problem: str | None = None
    """Where it stands and why it cannot be used; None if it can."""
    id: str | None = None
    num_tokens: int = 0
    num_learned: int = 0
    num_pictures: int = 0
    unread: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the samples come to."""

    num_checked: int
    num_samples: int
    """Of the whole data set."""
    sources: dict[str, int]
    """Samples of each source that were checked."""
    problems: tuple[str, ...]
    """One line for each sample that cannot be used."""
    num_pictures: int
    num_without_pictures: int
    num_with_several: int
    num_tokens: int
    num_learned: int
    token_quantiles: tuple[int, int, int, int]
    """Positions of the shortest sample, the middle one, the one that 99 % are shorter than, and the longest."""
    repeated_ids: tuple[str, ...]
    """Ids that several samples of one source have; such samples are learned from all the same."""
    unread: dict[str, int]
    """Keys that are not read, and the samples whose answers are learned without them."""


class _Findings(Dataset[Finding]):
    """Reads a sample and forgets it."""

    def __init__(self, dataset: ConversationDataset, *, reads_pictures: bool) -> None:
        self.dataset, self.reads_pictures = dataset, reads_pictures

    def __getitem__(self, index: int) -> Finding:
        source = self.dataset.source_of(index)
        try:
            conversation = self.dataset.conversation(index)
            tokens = self.dataset.tokens(index, conversation)
            if self.reads_pictures:
                for picture in conversation.pictures:
                    picture.read()
        except InputError as error:
            text = " ".join(str(error).split())
            origin = self.dataset.origin(index)
            return Finding(index=index, source=source, problem=text if text.startswith(origin) else f"{origin}: {text}")
        return Finding(
            index=index,
            source=source,
            id=conversation.id,
            num_tokens=len(tokens.token_ids),
            num_learned=sum(label != IGNORE for label in tokens.labels),
            num_pictures=len(conversation.pictures),
            unread=conversation.unread,
        )


def examine(
    dataset: ConversationDataset,
    indices: Sequence[int],
    *,
    num_workers: int,
    reads_pictures: bool = True,
    progress: Callable[[int], None] = lambda _: None,
) -> Report:
    """Read samples as training would, and count.

    Args:
        dataset: What to read.
        indices: Which samples; each once.
        num_workers: Processes that read; 0 reads in this one.
        reads_pictures: Decode every picture; without, only see that the files are there.
        progress: Gets the number of samples that were read since the last call.

    Raises:
        TrainingError: A worker process died or hangs.
    """
    loader: DataLoader[Finding] = DataLoader(
        _Findings(dataset, reads_pictures=reads_pictures),
        batch_size=_AT_ONCE,
        sampler=indices,
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=start_worker if num_workers else None,
        timeout=WORKER_TIMEOUT if num_workers else 0,
    )
    findings: list[Finding] = []
    for some in alive(loader):
        findings += some
        progress(len(some))
    return _count(findings, len(dataset))


def _count(findings: Sequence[Finding], num_samples: int) -> Report:
    good = [finding for finding in findings if finding.problem is None]
    lengths = sorted(finding.num_tokens for finding in good) or [0]
    ids = Counter((finding.source, finding.id) for finding in good if finding.id is not None)
    cuts = quantiles(lengths, n=100, method="inclusive") if len(lengths) > 1 else lengths * 99
    return Report(
        num_checked=len(findings),
        num_samples=num_samples,
        sources=dict(Counter(finding.source for finding in findings)),
        problems=tuple(finding.problem for finding in findings if finding.problem is not None),
        num_pictures=sum(finding.num_pictures for finding in good),
        num_without_pictures=sum(finding.num_pictures == 0 for finding in good),
        num_with_several=sum(finding.num_pictures > 1 for finding in good),
        num_tokens=sum(lengths),
        num_learned=sum(finding.num_learned for finding in good),
        token_quantiles=(lengths[0], round(cuts[49]), round(cuts[98]), lengths[-1]),
        repeated_ids=tuple(f"{name}" for (_, name), count in ids.items() if count > 1),
        unread=dict(Counter(key for finding in good for key in finding.unread)),
    )


def show(dataset: ConversationDataset, index: int) -> str:
    """Write a sample as the model will see it: `+` before the lines that are learned, nothing before the others.

    Control tokens are written `<|im_start|>`, `<|im_end|>` and `<image x N>`; letters that look like one, and
    backslashes, have a backslash before them, and a newline is written as backslash and n.
    """
    try:
        conversation = dataset.conversation(index)
        tokens = dataset.tokens(index, conversation)
        sizes = ["{} x {}".format(*picture.read().size) for picture in conversation.pictures]
    except InputError as error:
        return f"sample {index} cannot be used: {' '.join(str(error).split())}"
    pictures = f"{len(sizes)} picture{'s' * (len(sizes) != 1)}" + (f" ({', '.join(sizes)})" if sizes else "")
    learned = sum(label != IGNORE for label in tokens.labels)
    head = f"sample {index}, {dataset.origin(index)}: {pictures}, {len(tokens.token_ids)} tokens, {learned} learned"
    marked = [f"{'+' if is_learned else ' '} | {line}" for is_learned, line in lines(tokens, dataset.tokenizer)]
    return "\n".join([head, *marked])


def lines(tokens: Tokens, tokenizer: Tokenizer) -> Iterator[tuple[bool, str]]:
    """Cut ids into lines of text, at newlines and where learning begins or ends; each with whether it is learned."""
    pairs = zip(tokens.token_ids, tokens.labels, strict=True)
    for is_learned, run in groupby(pairs, key=lambda pair: pair[1] != IGNORE):
        text = _text([token_id for token_id, _ in run], tokenizer)
        for line in text.removesuffix("\n").split("\n"):
            yield is_learned, line


def _text(token_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    controls = {
        tokenizer.im_start_id: "<|im_start|>",
        tokenizer.im_end_id: "<|im_end|>",
        tokenizer.end_of_text_id: "<|endoftext|>",
    }

    def kind(token_id: int) -> int | None:
        return token_id if token_id in controls or token_id == tokenizer.image_id else None

    pieces = []
    for control, run in groupby(token_ids, key=kind):
        some = list(run)
        if control is None:
            pieces.append(_escaped(tokenizer.detokenize(some)))
        elif control == tokenizer.image_id:
            pieces.append(f"<image x {len(some)}>")
        else:
            pieces.append(controls[control] * len(some))
    return "".join(pieces)


def _escaped(text: str) -> str:
    text = text.replace("\\", "\\\\").replace("<|", "\\<|").replace(IMAGE_MARK[:-1], f"\\{IMAGE_MARK[:-1]}")
    return text.replace("\r", "\\r").translate(_CONTROLS).replace("\n", "\\n\n")
