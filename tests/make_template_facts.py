"""What publishers' own chat templates give for the conversations of template_facts.json: facts to compare with.

    python tests/make_template_facts.py qwen3=DIRECTORY/Qwen-Qwen3-0.6B.jinja ...

The templates themselves are not part of this repository; each one's source and sha256 are. "prompt" is what the model
is given to answer the last turn with; "text" is the whole conversation.
"""

import hashlib
import json
import sys
from pathlib import Path

FACTS = Path(__file__).parent / "template_facts.json"


def renderings(tokenizer, conversations):
    """{name: {"text", "prompt"}} of conversations by a tokenizer's template."""
    found = {}
    for name, messages in conversations.items():
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        found[name] = {
            "text": tokenizer.apply_chat_template(messages, tokenize=False),
            "prompt": tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True),
        }
    return found


def main():
    from test_multipack import family_tokenizer

    facts = json.loads(FACTS.read_text())
    for word in sys.argv[1:]:
        name, _, path = word.partition("=")
        template = Path(path).read_text()
        entry = facts["templates"][name]
        tokenizer = family_tokenizer(entry["ours"])
        tokenizer.chat_template = template
        entry["sha256"] = hashlib.sha256(template.encode()).hexdigest()
        entry["renderings"] = renderings(tokenizer, facts["conversations"])
    FACTS.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
