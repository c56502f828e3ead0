"""A judge behind OpenAI's form of chat, as vLLM and SGLang serve it: the real model, its template and its tokens, in a
thread."""
import base64
import io
import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch
from PIL import Image

TOP = 20


def image_at(url):
    head, _, coded = url.partition("base64,")
    assert head == "data:image/png;"
    return torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(coded))))).permute(2, 0, 1)


def next_tokens(judge, text, images, k=1):
    "Logits [V] of the token after a text with images."
    x = judge.processor(text=[text], images=[images] if images else None, return_tensors="pt",
                        add_special_tokens=judge.special(text))
    with torch.no_grad(): return judge.model(**dict(x.to(judge.device, judge.base.dtype))).logits[0, -1].float()


def answer(judge, body):
    "What a server makes of a request."
    user, *begun = body["messages"]
    images = [image_at(part["image_url"]["url"]) for part in user["content"] if part["type"] == "image_url"]
    parts = [None if part["type"] == "image_url" else part["text"] for part in user["content"]]
    text = judge.template(*parts)
    if begun:
        assert body["continue_final_message"] and not body["add_generation_prompt"]
        text += begun[0]["content"]
    generator, said, logprobs = torch.Generator().manual_seed(body.get("seed", 0)), [], []
    for _ in range(body["max_tokens"]):
        logits = next_tokens(judge, text + judge.tokenizer.decode(said), images)
        logp = logits.log_softmax(-1)
        best = logp.topk(min(body.get("top_logprobs", 1), TOP, len(logp)))
        tokens = [dict(token=judge.tokenizer.decode([i]), logprob=value)
                  for i, value in zip(best.indices.tolist(), best.values.tolist())]
        logprobs.append(dict(token="", logprob=0., top_logprobs=tokens))
        token = torch.multinomial((logits/body["temperature"]).softmax(-1), 1, generator=generator).item()
        if token in judge.eos: break
        said.append(token)
    choice = dict(message=dict(role="assistant", content=judge.tokenizer.decode(said)), finish_reason="stop")
    if body.get("logprobs"): choice["logprobs"] = dict(content=logprobs)
    return dict(choices=[choice])


@contextmanager
def served(judge, fault=lambda n: None, name="the judge"):
    """A server of this judge: its address and a list of the requests. `fault(n)` says what becomes of the n-th: None,
    a status, the bytes of another answer, or a function that is given the answer."""
    asked, counted, lock = [], Counter(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args): pass

        def send(self, status, data):
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self): self.send(200, json.dumps(dict(data=[dict(id=name)])).encode())

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:   # one model, and requests in an order
                asked.append(body)
                found = fault(counted.total())
                counted["requests"] += 1
                if isinstance(found, int): return self.send(found, b"no room")
                if isinstance(found, bytes): return self.send(200, found)
                reply = answer(judge, body)
            if found: reply = found(reply)
            try: self.send(200, json.dumps(reply).encode())
            except OSError: pass   # nobody waits for it any more

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try: yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
