"""Plain and speculative decoding side by side, in one engine: the same tokens, in how much time?

python examples/compare.py
"""

from paceline import Engine, SamplingParams

engine = Engine.from_pretrained("default")
code = "def area(width, height):\n    return width * height\n"
messages = [{"role": "user", "content": f"Rename `width` to `w` and `height` to `h`:\n\n{code}"}]
params = SamplingParams(max_tokens=48)
engine.chat(messages, params)  # warm up

plain = engine.chat(messages, params, plain=True)
speculative = engine.chat(messages, params)
print(speculative.text)
print(f"plain        {plain.tokens_per_second:6.1f} tokens/s")
print(f"speculative  {speculative.tokens_per_second:6.1f} tokens/s")
print(f"same tokens: {plain.token_ids == speculative.token_ids}")
engine.close()
