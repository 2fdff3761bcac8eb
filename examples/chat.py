"""A conversation of two turns, sampled with a seed: run it again and it says the same.

python examples/chat.py
"""

from paceline import Engine, SamplingParams

engine = Engine.from_pretrained("default")
params = SamplingParams(max_tokens=40, temperature=0.7, top_p=0.9, seed=1)
messages = [{"role": "system", "content": "You answer in one sentence."}]
for question in ("What is a glacier?", "Where would I see one?"):
    messages.append({"role": "user", "content": question})
    answer = engine.chat(messages, params)
    messages.append({"role": "assistant", "content": answer.text})
    print(f"> {question}\n{answer.text}")
engine.close()
