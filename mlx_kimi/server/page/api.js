// What the server is asked, and what it says.

// What went wrong, as a line for the reader. `kind`: "key", "lost", "stopped" or "refused".
export class Problem extends Error {
  constructor(kind, line) {
    super(line);
    this.kind = kind;
  }
}

const UNREACHABLE = "The server cannot be reached. Start `mlx_kimi serve` again, then retry.";
const LOST = "The connection was lost before the answer ended. What came is kept.";

// The model that is served: { id, max_model_len }.
export async function servedModel(key) {
  const response = await asked("v1/models", { headers: headers(key) });
  return (await response.json()).data[0];
}

// The pieces of an answer as they come: { text }, { call }, { progress }, { finish }, { usage }.
export async function* answerTo(body, key, signal) {
  const response = await asked("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "content-type": "application/json" },
    body: JSON.stringify({
      ...body,
      stream: true,
      stream_options: { include_usage: true },
      return_progress: true,
    }),
    signal,
  });
  for await (const event of events(response, signal)) {
    if (event.error) throw new Problem("refused", event.error.message);
    yield* piecesOf(event);
  }
}

function headers(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function asked(path, options) {
  let response;
  try {
    response = await fetch(path, { credentials: "omit", cache: "no-store", redirect: "error", ...options });
  } catch {
    throw options.signal?.aborted ? stopped(options.signal) : new Problem("lost", UNREACHABLE);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const said = await response.json().then((body) => body.error.message, () => `status ${response.status}`);
  if (response.status === 401) return new Problem("key", "The server wants its API key: enter it below.");
  if (response.status === 503) {
    const seconds = response.headers.get("retry-after");
    return new Problem("refused", seconds ? `Busy: retry in ${seconds} s. ${said}` : said);
  }
  return new Problem("refused", said);
}

function stopped(signal) {
  return new Problem("stopped", signal.reason);
}

// The JSON of server-sent events, up to `[DONE]`.
async function* events(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read().catch(() => {
      throw signal.aborted ? stopped(signal) : new Problem("lost", LOST);
    });
    if (done) throw new Problem("lost", LOST);
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      if (!block.startsWith("data: ")) continue; // a comment, so that the connection is seen to live
      const data = block.slice("data: ".length);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function* piecesOf(event) {
  if (event.prompt_progress) yield { progress: event.prompt_progress };
  if (event.usage) yield { usage: event.usage };
  for (const { delta, finish_reason: finish } of event.choices ?? []) {
    if (delta.content) yield { text: delta.content };
    for (const call of delta.tool_calls ?? []) yield { call };
    if (finish) yield { finish };
  }
}
