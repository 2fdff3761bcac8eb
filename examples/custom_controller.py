"""A controller of one's own: draft twice as much after a draft that was accepted whole, half as much after a rejection.

python examples/custom_controller.py
"""

from paceline import Engine, SamplingParams
from paceline.control.base import Controller, RoundContext, longest_outlook
from paceline.records import Plan, StepRecord


class Doubling(Controller):
    """Knows finished rounds only, so it cannot change what the answer says."""

    name = "doubling"

    def __init__(self) -> None:
        self.length = 2

    def plan(self, context: RoundContext) -> Plan:
        outlook = longest_outlook(context)
        if outlook is None:
            return Plan(None, 0, "nothing to draft")
        num_draft = min(self.length, context.max_draft, outlook.available)
        return Plan(outlook.drafter, num_draft, f"length {self.length}") if num_draft else Plan(None, 0, "no room")

    def observe(self, record: StepRecord) -> None:
        if record.num_drafted and not record.truncated:
            whole = record.num_accepted == record.num_drafted
            self.length = min(16, self.length * 2) if whole else max(1, self.length // 2)


engine = Engine.from_pretrained("default", draft="ngram")
engine.controller = Doubling()
prompt = [{"role": "user", "content": "Repeat three times: The quick brown fox jumps over the lazy dog."}]
result = engine.chat(prompt, SamplingParams(max_tokens=48))
print(result.text)
for step in result.steps:
    print(f"drafted {step.num_drafted:2d}  accepted {step.num_accepted:2d}  {step.reason}")
engine.close()
