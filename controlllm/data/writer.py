"""Documents to text: filled into a plan where that is sound, else written by the template itself."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from controlllm.data.plan import Filled, Plan, difference, make_plan, utf8_lengths
from controlllm.data.template import ChatTemplate
from controlllm.data.types import TEXT, Documents
from controlllm.data.written import Written
from controlllm.errors import UserError

_PLAN_FROM = 8  # rows of a shape in a block that make a plan worth its cost
_CHECKED_FIRST = 64  # rows of each shape that a process writes both ways
_CHECKED_AFTER = 0.0025  # share of the others


class Writer:
    """Keeps the plans, and turns all of them off at the first row that a plan fills in otherwise than the template."""

    def __init__(self, template: ChatTemplate, *, targets: str):
        self._template = template
        self._targets = targets
        self._plans: dict[tuple[str, ...], Plan | str] = {}
        self.off = ""
        """Why plans are off."""
        self.notes: list[str] = []
        self._checked: Counter[tuple[str, ...]] = Counter()

    def write(self, documents: Documents, indices: Sequence[int]) -> tuple[Written, Counter[str]]:
        """Also the number of documents by way: plan, template, text."""
        block = _Block(documents, np.asarray(indices, np.int64))
        slow: list[int] = []
        for shape in np.unique(block.shape).tolist():
            rows = np.flatnonzero(block.shape == shape)
            if shape < 0:
                slow += rows.tolist()
            elif documents.shapes[shape] == TEXT:
                block.put_texts(rows)
            else:
                slow += self._fill(block, shape, rows)
        for row in sorted(slow):
            try:
                rendered = self._template.render(documents[block.index[row]], targets=self._targets)  # type: ignore[arg-type]
                block.put(row, checked_text(rendered.text), rendered.spans)
            except UserError as error:
                block.bad.append((int(block.index[row]), str(error)))
        texts = int(block.plain.sum())
        return block.written(), Counter(text=texts, template=len(slow), plan=len(block.index) - texts - len(slow))

    def refusals(self) -> list[str]:
        """Why shapes have no plan."""
        return sorted({plan for plan in self._plans.values() if isinstance(plan, str)})

    def _fill(self, block: "_Block", shape: int, rows: np.ndarray) -> list[int]:
        """Rows that are left for the template."""
        roles = block.documents.shapes[shape]
        plan = self._plan(roles, len(rows))
        if plan is None:
            return rows.tolist()
        columns = block.columns(rows, len(roles))
        if refused := plan.refuses(columns):
            fine = np.setdiff1d(np.arange(len(rows)), refused)
            columns = [[column[i] for i in fine.tolist()] for column in columns]
            refused, rows = rows[refused].tolist(), rows[fine]
        if not len(rows):
            return refused
        try:
            filled = plan.fill(columns)
        except UnicodeEncodeError:
            return [*refused, *rows.tolist()]
        if example := self._wrong(block, roles, rows, filled):
            self.off = f"the template writes otherwise than was planned: {example}"
            self.notes.append(self.off)
            return [*refused, *rows.tolist()]
        block.put_filled(rows, filled)
        return refused

    def _plan(self, roles: tuple[str, ...], rows: int) -> Plan | None:
        if self.off:
            return None
        if roles not in self._plans:
            if rows < _PLAN_FROM:
                return None
            try:
                self._plans[roles] = make_plan(self._template, roles, self._targets)
            except UserError as error:
                self._plans[roles] = str(error)
        plan = self._plans[roles]
        return plan if isinstance(plan, Plan) else None

    def _wrong(self, block: "_Block", roles: tuple[str, ...], rows: np.ndarray, filled: Filled) -> str:
        """The first of a sample of the rows that is not as the template writes it; '' where all are."""
        first = max(0, _CHECKED_FIRST - self._checked[roles])
        self._checked[roles] += len(rows)
        spread = block.documents.numbers[block.index[rows]].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        chosen = spread < np.uint64(int(_CHECKED_AFTER * 2**64))
        chosen[:first] = True
        for i in np.flatnonzero(chosen).tolist():
            index = int(block.index[rows[i]])
            try:
                exact = self._template.render(block.documents[index], targets=self._targets)  # type: ignore[arg-type]
            except UserError:
                exact = None  # it will be refused with this reason once plans are off
            if exact is None or difference(exact, filled, i):
                return f"row {block.documents.numbers[index]}"
        return ""


class _Block:
    """Some of the documents while they become text."""

    def __init__(self, documents: Documents, index: np.ndarray):
        self.documents, self.index = documents, index
        self.shape = documents.shape[index]
        if documents.whole:
            whole = np.fromiter((i in documents.whole for i in index.tolist()), bool, len(index))
            self.shape = np.where(whole, -1, self.shape)
        self.texts: list[str | None] = [None] * len(index)
        self.sizes = np.zeros(len(index), np.int64)
        self.plain = np.zeros(len(index), bool)
        self.bad: list[tuple[int, str]] = []
        self._spans: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # of which row, begin, end

    def columns(self, rows: np.ndarray, count: int) -> list[list[str]]:
        """`count` lists, one per message, of the contents of `rows`."""
        contents, first = self.documents.contents, self.documents.offsets[self.index[rows]].tolist()
        return [[contents[at + message] for at in first] for message in range(count)]

    def put_filled(self, rows: np.ndarray, filled: Filled) -> None:
        for row, text in zip(rows.tolist(), filled.texts, strict=True):
            self.texts[row] = text
        self.sizes[rows] = filled.sizes
        spans = filled.begins.shape[1]
        self._spans.append((np.repeat(rows, spans), filled.begins.ravel(), filled.ends.ravel()))

    def put(self, row: int, text: str, spans: Sequence[tuple[int, int]]) -> None:
        """`spans` in characters."""
        self.texts[row], self.sizes[row] = text, len(text.encode())
        places = np.array([[len(text[:at].encode()) for at in span] for span in spans], np.int64).reshape(-1, 2)
        self._spans.append((np.full(len(places), row), places[:, 0], places[:, 1]))

    def put_texts(self, rows: np.ndarray) -> None:
        column = self.columns(rows, 1)[0]
        self.plain[rows] = True
        for row, text in zip(rows.tolist(), column, strict=True):
            try:
                self.texts[row] = checked_text(text)
            except UserError as error:
                self.bad.append((int(self.index[row]), str(error)))
        good = rows[[self.texts[row] is not None for row in rows.tolist()]]
        self.sizes[good] = utf8_lengths([self.texts[row] or "" for row in good.tolist()])
        self._spans.append((good, np.zeros(len(good), np.int64), self.sizes[good]))

    def written(self) -> Written:
        good = np.array([text is not None for text in self.texts], bool)
        span_of, begins, ends = (
            np.concatenate([np.zeros(0, np.int64), *(spans[k] for spans in self._spans)]) for k in range(3)
        )
        return Written(
            index=self.index[good],
            texts=[text for text in self.texts if text is not None],
            sizes=self.sizes[good],
            span_of=(np.cumsum(good) - 1)[span_of],
            begins=begins,
            ends=ends,
            plain=self.plain[good],
            bad=sorted(self.bad),
        )


def checked_text(text: str) -> str:
    """UserError for a text that is empty or no text."""
    if not text or text.isspace():
        raise UserError("the text is empty: nothing to learn")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"character {error.start + 1} is a lone surrogate, half of a UTF-16 pair") from None
    return text
