-- Sends the given requests in turn: wrk -s wrk.lua URL -- REQUEST-FILE...
-- Each file holds the raw bytes of one HTTP request.

local requests = {}
local turn = 0

function init(args)
  for i = 1, #args do
    local file = assert(io.open(args[i], "rb"))
    requests[i] = file:read("*a")
    file:close()
  end
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    'RESULT {"requests":%d,"num_bytes":%.0f,"seconds":%.6f,"p50_ms":%.3f,"p99_ms":%.3f,' ..
    '"not_ok":%d,"broken":%d}\n',
    summary.requests, summary.bytes, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
