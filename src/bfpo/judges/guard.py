"""A judge on a local guard model, in any format: p(safe) from the probabilities of its label words."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from bfpo.core.schema import Completion, Message, Verdict
from bfpo.judges.answers import MIN_MASS, AnswerModel, WordAnswer, label_tokens
from bfpo.judges.formats import Ask, Format, Reading
from bfpo.judges.local import PromptEncoder, fitting, num_embeddings_of, tokenizer_key, version_of
from bfpo.judges.panel import worst_verdict
from bfpo.judges.settings import GuardSpec

__all__ = ["GuardJudge"]

_PROBE = "bfpoprobe"


class GuardJudge:
    """Judges by a local generative guard.

    Without `model` in the spec, the format's own model is loaded. p(safe) is the probability of the safe words among
    all label words; the label is safe from `threshold` on. A text longer than `max_length` tokens (by default 4096)
    with its prompt is unscored, never cut. A format with several principles asks about each in the same batches; the
    largest p(unsafe) counts. `batch_size` changes neither a verdict nor the version.

    Raises `ModelError` for a model that cannot be loaded or whose tokenizer does not distinguish the format's words.
    """

    def __init__(self, format: Format, spec: GuardSpec) -> None:
        self.format = format
        self.name = spec.name or format.name
        self._threshold = spec.threshold
        self._answers = AnswerModel(
            spec.model or format.model, spec, max_length=spec.max_length or 4096, multimodal=format.multimodal
        )
        self._room = self._answers.room(format.max_new_tokens if format.generates else 1)
        self._encoder = PromptEncoder(
            self._answers.tokenizer,
            markers=format.markers,
            template_arguments=format.template_arguments,
            content_as_parts=format.multimodal,
            variables=spec.chat_template_kwargs,
            num_embeddings=num_embeddings_of(self._answers.model),
        )
        self._variables = {"chat_template_kwargs": spec.chat_template_kwargs} if spec.chat_template_kwargs else {}
        self._tokenizer_key = tokenizer_key(self._answers.tokenizer)
        groups = [format.safe_words, format.unsafe_words]
        if format.unscored_words:
            groups.append(format.unscored_words)
        self._labels = label_tokens(self._encoder, self._before_label(), groups)

    def _before_label(self) -> str:
        """Return the format's own text directly before the label, as far as it is the same for all completions."""
        prefix = self.format.answer_prefix
        if self.format.generates:
            return prefix
        probe = Completion("probe", (Message("user", _PROBE),), _PROBE)
        text = self._encoder.render(self.format.ask(probe)).rpartition(_PROBE)[2]
        return text if text.endswith(prefix) else text + prefix

    @cached_property
    def version(self) -> str:
        """Return the format's version with a digest of weights, tokenizer and the settings that change verdicts."""
        return version_of(
            self.format.version,
            self._answers.model,
            self._tokenizer_key,
            max_length=self._answers.max_length,
            max_new_tokens=self.format.max_new_tokens,
            threshold=self._threshold,
            min_mass=MIN_MASS,
            **self._variables,
        )

    def judge(self, completions: Sequence[Completion]) -> list[Verdict]:
        """Return the verdicts, one per completion, in order."""
        form = self.format

        def encode(item: tuple[Completion, Ask]) -> list[int]:
            prefix = "" if form.generates else form.answer_prefix
            return self._encoder.ids([item[0]], item[1], answer_prefix=prefix)

        num_forced = 0 if form.generates else len(self._labels.shared)
        items = {
            (number, place): (completion, ask)
            for number, completion in enumerate(completions)
            for place, (_, ask) in enumerate(form.questions)
        }
        rows, reasons = fitting(items, encode, self._room, length=lambda ids: len(ids) + num_forced)
        answers = self._answers.answer(
            list(rows.values()),
            self._labels,
            self._encoder,
            before=form.answer_prefix if form.generates else None,
            limit=form.max_new_tokens,
        )
        found = dict(zip(rows, answers, strict=True))

        def verdict(number: int, place: int) -> Verdict:
            completion, key = completions[number], (number, place)
            return self._verdict(completion, found[key]) if key in found else self._unscored(completion, reasons[key])

        return [
            worst_verdict([(name, verdict(number, place)) for place, (name, _) in enumerate(form.questions)])
            for number in range(len(completions))
        ]

    def _unscored(self, completion: Completion, reason: str, raw: str = "") -> Verdict:
        return Verdict(completion.id, self.name, "unscored", reason=reason, raw=raw)

    def _verdict(self, completion: Completion, answer: WordAnswer) -> Verdict:
        """Return the verdict of an answer: its text must be readable, its probabilities decide."""
        reading = self.format.read(answer.text) if self.format.generates else Reading("unscored")
        if self.format.generates and reading.label == "unscored":
            return self._unscored(completion, reading.reason, answer.text)
        masses = answer.masses
        if masses is None or not sum(masses) >= MIN_MASS:  # true also for NaN
            if self.format.generates:  # the label has another place or spelling in the text
                return self._scored(completion, reading, None, answer.text)
            reason = f"the label words have {sum(masses or ()):.2g} of the probability; {MIN_MASS} is needed"
            return self._unscored(completion, reason, answer.text)
        if len(masses) > 2 and masses[2] > max(masses[:2]):
            return self._unscored(completion, "the most probable label counts as neither safe nor unsafe", answer.text)
        return self._scored(completion, reading, masses[0] / (masses[0] + masses[1]), answer.text)

    def _scored(self, completion: Completion, reading: Reading, p_safe: float | None, raw: str) -> Verdict:
        label = reading.label if p_safe is None else "safe" if p_safe >= self._threshold else "unsafe"
        return Verdict(
            completion.id, self.name, label, refused=reading.refused, reason=reading.reason, p_safe=p_safe, raw=raw
        )
