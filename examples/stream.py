"""Print an answer while it is made; drafted-and-accepted tokens are marked by the events.

python examples/stream.py
"""

from paceline import Engine, SamplingParams

engine = Engine.from_pretrained("default")
messages = [{"role": "user", "content": "Write the numbers from one to twelve as words, one on each line."}]
for event in engine.chat_stream(messages, SamplingParams(max_tokens=48)):
    print(event.text, end="", flush=True)
    if event.result is not None:
        print(f"\n[{sum(event.result.from_draft)} of {event.result.num_tokens} tokens came from the draft]")
engine.close()
