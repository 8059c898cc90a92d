-- EMIT, once per engine step and API process. ARGV: worker, api, items (JSON): each {rid, attempt, from_seq,
-- [token], finish, error, [logprob JSON], meta JSON}, '' for none. Tokens, terminal, acknowledgement and
-- delivery are one atomic step, and a repeated call changes nothing. Returns for each item 'ok', 'stale'
-- (another attempt owns the request), 'cancel' (its end is told already) or 'behind:n' (the log was cut: send
-- again from n). An item without tokens and finish asks whether the request is still wanted.
local worker, api = ARGV[1], ARGV[2]
local now, frames, results = now_ms(), {}, {}

local function log_logprobs(rid, have, new)
  local missing, key = {}, logprob_key(rid)
  for _ = redis.call('LLEN', key), have - 1 do missing[#missing + 1] = 'null' end
  push_all(key, missing)
  push_all(key, new)
end

local function append(item, have, ttl_s)
  local rid, from, tokens, logprobs = item[1], item[3], {}, {}
  for k = have - from + 1, #item[4] do
    tokens[#tokens + 1] = item[4][k]
    logprobs[#logprobs + 1] = item[7][k]
  end
  push_all(tok_key(rid), tokens)
  if #logprobs > 0 then log_logprobs(rid, have, logprobs) end
  if have == 0 and #tokens > 0 then expire_logs(rid, ttl_s) end
  local meta = item[8]
  if meta ~= '' and redis.call('HSETNX', req_key(rid), 'meta', meta) == 0 then meta = '' end
  if #tokens > 0 or item[5] ~= '' or meta ~= '' then
    frames[#frames + 1] = frame(rid, item[2], have, tokens, item[5], item[6], logprobs, meta)
  end
  if item[5] ~= '' then close(rid, item[5], item[6]) end
end

local function emit(item)
  local rid = item[1]
  local h = redis.call('HMGET', req_key(rid), 'attempt', 'worker', 'state', 'cancel', 'deadline_ms', 'finish')
  if tonumber(h[1] or -1) ~= item[2] or h[2] ~= worker then return 'stale' end
  local have = redis.call('LLEN', tok_key(rid))
  if h[3] == 'done' and h[6] == item[5] and have == item[3] + #item[4] then return 'ok' end
  if h[3] ~= 'running' then return 'stale' end
  local finish, err = verdict(h[4], api, h[5], now)
  if finish then
    close(rid, finish, err)
    frames[#frames + 1] = frame(rid, item[2], have, {}, finish, err, {}, '')
    return 'cancel'
  end
  if have < item[3] then return 'behind:' .. have end
  append(item, have, live_ttl_s(h[5] - now))
  return 'ok'
end

for i, item in ipairs(cjson.decode(ARGV[3])) do results[i] = emit(item) end
if #frames > 0 then send(api, frames) end
return results
