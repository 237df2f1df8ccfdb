"""`python -m convtool.cli.schemas COMMAND` prints the JSON Schema of what `convtool COMMAND --json` prints."""

import json
import sys

from convtool.cli.app import app
from convtool.cli.schemas import schema

commands = [command.name or "" for command in app.registered_commands]
if len(sys.argv) != 2 or sys.argv[1] not in commands:
    sys.exit(f"expected one command: {', '.join(commands)}")
print(json.dumps(schema(sys.argv[1]), indent=2))
