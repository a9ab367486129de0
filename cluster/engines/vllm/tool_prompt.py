"""Tool prompt for models whose chat template ignores tools.

Such a model would never see the tools of a request, and its template may fail on messages with
calls or results. ``TOOL_PROMPT`` is put before the template and rewrites ``messages`` for it: the
first user message begins with the tools, calls become text in Hermes' format, and consecutive
results become one user message. User messages suit every template: some reject system messages,
the role ``tool``, or two messages of one role in a row.
"""

# Each tag strips the line breaks around it, which would otherwise reach the prompt. The last
# expression keeps those of the template that follows.
TOOL_PROMPT = r"""
{%- macro tool_text(content) -%}
  {{- content if content is string else (content or []) | map(attribute='text') | join('\n') -}}
{%- endmacro -%}
{%- set ns = namespace(out=[], shown=not tools, results='') -%}
{%- set tool_intro -%}
  {{- 'You can call these functions:\n<tools>\n' -}}
  {%- for tool in tools or [] -%}{{- (tool.function | tojson) ~ '\n' -}}{%- endfor -%}
  {{- '</tools>\nTo call one, reply with its name and arguments as JSON inside tags:\n' -}}
  {{- '<tool_call>\n{"name": "function", "arguments": {"argument": "value"}}\n</tool_call>' -}}
  {{- '\n\n' -}}
{%- endset -%}
{%- for m in messages -%}
  {%- if m.role == 'tool' -%}
    {%- set result = '<tool_response>\n' ~ tool_text(m.content) ~ '\n</tool_response>\n' -%}
    {%- set ns.results = ns.results ~ result -%}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}
      {%- set ns.out = ns.out + [{'role': 'user', 'content': ns.results}] -%}
      {%- set ns.results = '' -%}
    {%- endif -%}
  {%- elif m.tool_calls -%}
    {%- set calls -%}
      {{- tool_text(m.content) -}}
      {%- for call in m.tool_calls -%}
        {%- set fields = {'name': call.function.name, 'arguments': call.function.arguments} -%}
        {{- '<tool_call>\n' ~ (fields | tojson) ~ '\n</tool_call>\n' -}}
      {%- endfor -%}
    {%- endset -%}
    {%- set ns.out = ns.out + [{'role': m.role, 'content': calls}] -%}
  {%- elif m.role == 'user' and not ns.shown -%}
    {%- set ns.shown = true -%}
    {%- if m.content is string -%}
      {%- set ns.out = ns.out + [{'role': 'user', 'content': tool_intro ~ m.content}] -%}
    {%- else -%}
      {%- set parts = [{'type': 'text', 'text': tool_intro}] + m.content -%}
      {%- set ns.out = ns.out + [{'role': 'user', 'content': parts}] -%}
    {%- endif -%}
  {%- else -%}
    {%- set ns.out = ns.out + [m] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = ns.out -%}
{{- '' }}"""
