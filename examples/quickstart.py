"""Answer one prompt, and see what speculation did.

python examples/quickstart.py
"""

from paceline import Engine, SamplingParams

engine = Engine.from_pretrained("default")
result = engine.chat(
    [{"role": "user", "content": "Repeat this list in alphabetical order: pear, apple, plum, cherry."}],
    SamplingParams(max_tokens=48),
)
print(result.text)
print(f"{result.num_tokens} tokens in {result.num_rounds} rounds, {result.tokens_per_second:.1f} tokens/s")
print(f"{result.num_accepted} of {result.num_drafted} drafted tokens were accepted")
engine.close()
