-- In front of every script: names of keys, and the ways in which a request leaves the queue.
local PREFIX, GROUP = 'fx:{inf}:', 'w'
local OUT_LENGTH, OUT_TTL_S, DLQ_LENGTH = 20000, 3600, 10000
local ENDED_TTL_S, SLACK_S = 600, 3600

local function lane_key(lane) return PREFIX .. 'q:' .. lane end
local function req_key(rid) return PREFIX .. 'req:' .. rid end
local function tok_key(rid) return PREFIX .. 'tok:' .. rid end
local function logprob_key(rid) return PREFIX .. 'lp:' .. rid end
local function api_key(api) return PREFIX .. 'api:' .. api end

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- Removes an entry from its lane and from the list of pending ones.
local function drop(lane, eid)
  redis.call('XACK', lane_key(lane), GROUP, eid)
  redis.call('XDEL', lane_key(lane), eid)
end

-- JSON of shared.messages.Frame. `tokens` are numbers; `logprobs` and `meta` are JSON already.
local function frame(rid, attempt, from, tokens, finish, err, logprobs, meta)
  local parts = {'{"request_id":"', rid, '","attempt":', attempt, ',"from_seq":', from,
    ',"tokens":[', table.concat(tokens, ','), ']'}
  local function add(name, json) parts[#parts + 1] = ',"' .. name .. '":' .. json end
  if finish ~= '' then add('finish', '"' .. finish .. '"') end
  if err ~= '' then add('error', cjson.encode(err)) end
  if #logprobs > 0 then add('logprobs', '[' .. table.concat(logprobs, ',') .. ']') end
  if meta ~= '' then add('meta', meta) end
  parts[#parts + 1] = '}'
  return table.concat(parts)
end

-- One stream entry with all frames of one step for one API process.
local function send(api, frames)
  local key = PREFIX .. 'out:' .. api
  redis.call('XADD', key, 'MAXLEN', '~', OUT_LENGTH, '*', 'f', '[' .. table.concat(frames, ',') .. ']')
  redis.call('EXPIRE', key, OUT_TTL_S)
end

local function live_ttl_s(remaining_ms) return math.max(0, math.ceil(remaining_ms / 1000)) + SLACK_S end

local function expire_logs(rid, ttl_s)
  redis.call('EXPIRE', tok_key(rid), ttl_s)
  redis.call('EXPIRE', logprob_key(rid), ttl_s)
end

-- The request is over: its entry goes, its log stays a while for an owner that missed frames.
local function close(rid, finish, err)
  local h = redis.call('HMGET', req_key(rid), 'lane', 'eid')
  if h[1] and h[2] then drop(h[1], h[2]) end
  redis.call('HSET', req_key(rid), 'state', 'done', 'finish', finish, 'error', err)
  redis.call('HDEL', req_key(rid), 'payload')
  redis.call('EXPIRE', req_key(rid), ENDED_TTL_S)
  expire_logs(rid, ENDED_TTL_S)
end

-- Ends a request that no step ends, and tells its owner.
local function terminate(rid, finish, err)
  local h = redis.call('HMGET', req_key(rid), 'attempt', 'api')
  close(rid, finish, err)
  send(h[2], {frame(rid, h[1], redis.call('LLEN', tok_key(rid)), {}, finish, err, {}, '')})
end

-- Why a request should not run any longer: finish and error, or nothing.
local function verdict(cancel, api, deadline_ms, now)
  if cancel then return 'cancelled', '' end
  if redis.call('EXISTS', api_key(api)) == 0 then return 'cancelled', 'api_lost' end
  if now > tonumber(deadline_ms) then return 'error', 'deadline_exceeded' end
end

-- Streams and their group are made together, so a stream that exists has its group.
local function ensure_lane(lane)
  if redis.call('EXISTS', lane_key(lane)) == 0 then
    redis.call('XGROUP', 'CREATE', lane_key(lane), GROUP, '0', 'MKSTREAM')
  end
end

local function push_all(key, values)
  for i = 1, #values, 1000 do
    redis.call('RPUSH', key, unpack(values, i, math.min(i + 999, #values)))
  end
end
