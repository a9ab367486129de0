-- Asks for the same stream again and again; wrk -s wrk.lua URL -- REQUEST-FILE
-- The file holds the request's bytes as they go over the wire.

local asked

function init(args)
  local file = assert(io.open(args[1], "rb"))
  asked = file:read("*a")
  file:close()
end

function request()
  return asked
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
